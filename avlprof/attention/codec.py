"""Keys and values in few bits: codes packed into bytes, and a scale and an offset for each group of numbers.

A token of a head is quantised by itself, so that tokens are moved, chosen and dropped as they are.
Its numbers are cut into groups of at most 32 neighbours, and `number = code * scale + offset`. Codes are
packed along the head's numbers, low bits first:

| bits | codes | bytes | where code `i` is |
|---|---|---|---|
| 8 | 1 | 1 | byte `i` |
| 4 | 2 | 1 | the low half of byte `i / 2` for an even `i`, the high half for an odd one |
| 3 | 8 | 3 | bits `3 (i % 8)` and the next two of 24, the first of three bytes being the lowest |
| 2 | 4 | 1 | bits `2 (i % 4)` and the next of byte `i / 4` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.policy import scale_group

_PACKS = {8: (1, 1), 4: (2, 1), 3: (8, 3), 2: (4, 1)}
"""Codes that share so many bytes, by bits."""

SCALE = torch.float16
"""Scales and offsets are half-precision numbers."""


@dataclass(frozen=True)
class Packed:
    """Numbers `[..., size]` in `bits` bits each.

    `codes` are uint8 `[..., bytes]`, `scale` and `offset` fp16 `[..., groups]`. All dimensions but the last
    are those of the numbers, so tokens are sliced, gathered and moved by `each`.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    size: int

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and offsets."""
        return self.codes, self.scale, self.offset

    @property
    def tokens(self) -> int:
        """Length of the last dimension but one."""
        return self.codes.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind codes, scales and offsets."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    def each(self, change: Callable[..., Tensor], *others: Packed) -> Packed:
        """What `change` makes of the codes, the scales and the offsets, each with those of `others`."""
        codes, scale, offset = (
            change(*parts) for parts in zip(self.parts, *(other.parts for other in others), strict=True)
        )
        return replace(self, codes=codes, scale=scale, offset=offset)

    def narrow(self, start: int, count: int) -> Packed:
        """A view of `count` tokens from `start` on."""
        return self.each(lambda part: part.narrow(-2, start, count))


def encode(states: Tensor, bits: int) -> Packed:
    """Quantise `[..., size]` to the nearest codes between the least and the largest number of each group.

    Args:
        states: numbers of any floating type; beyond what fp16 holds they are cut off.
        bits: 8, 4, 3 or 2.
    """
    codes, scale, offset = _coded(states, bits)
    return Packed(_pack(codes.to(torch.uint8).flatten(-2), bits), scale, offset, bits, states.shape[-1])


def _coded(states: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `encode` as floats `[..., groups, size / groups]`, scales and offsets."""
    most = (1 << bits) - 1
    grouped = _split(states.float(), scale_group(states.shape[-1]))
    low, high = grouped.aminmax(dim=-1)
    limit = torch.finfo(SCALE).max
    offset = low.clamp(-limit, limit).to(SCALE)
    scale = ((high - offset.float()) / most).clamp(0.0, limit).to(SCALE)
    step = scale.float()[..., None]
    codes = (grouped - offset.float()[..., None]) / step.masked_fill(step == 0.0, 1.0)
    return codes.round_().clamp_(0, most), scale, offset


def decode(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers `[..., size]`, worked out in fp32."""
    codes = _unpack(packed.codes, packed.bits, packed.size)
    grouped = _split(codes.contiguous(), scale_group(packed.size))
    return _numbers(grouped, packed.scale, packed.offset, dtype)


def _numbers(codes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers `[..., size]` of codes as floats by group, which are overwritten."""
    return codes.mul_(scale.float()[..., None]).add_(offset.float()[..., None]).flatten(-2).to(dtype)


def degraded(states: Tensor, bits: int) -> Tensor:
    """`states` as they are after they were stored in `bits` bits, in their own type.

    The very numbers of `decode(encode(states, bits))`, without a detour by packed bytes.
    """
    return _numbers(*_coded(states, bits), states.dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., size]` as bytes; the last are filled up with zeros."""
    together, width = _PACKS[bits]
    if together == 1:
        return codes
    codes = _split(pad(codes, (0, -codes.shape[-1] % together)), together).int()
    word = (codes << _shifts(bits, together, codes.device)).sum(dim=-1, dtype=torch.int32)
    return (word[..., None] >> _shifts(8, width, codes.device)).to(torch.uint8).flatten(-2)


def _unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """The codes `[..., size]` of bytes as floats, looked up several at a time."""
    if bits == 8:
        return packed.float()
    word = packed.int()
    if bits == 3:  # three bytes are two words of twelve bits, of four codes each
        low, middle, high = _split(word, 3).unbind(-1)
        word = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], dim=-1).flatten(-2)
    each, wide = (2, torch.float64) if bits == 4 else (4, torch.complex128)
    every = torch.arange(1 << bits * each, dtype=torch.int32, device=packed.device)
    table = (every[:, None] >> _shifts(bits, each, packed.device)) & ((1 << bits) - 1)
    # the floats of a word are looked up as one number of their width, which copies them whole
    found = table.float().view(wide)[:, 0].index_select(0, word.flatten())
    return found.view(torch.float32).view(*word.shape[:-1], word.shape[-1] * each)[..., :size]


def _split(numbers: Tensor, count: int) -> Tensor:
    """`[..., n]` as `[..., n / count, count]`."""
    return numbers.view(*numbers.shape[:-1], numbers.shape[-1] // count, count)


def _shifts(by: int, count: int, device: torch.device) -> Tensor:
    """0, `by`, 2 `by`, ... of a word of `count` parts."""
    return torch.arange(0, by * count, by, dtype=torch.int32, device=device)


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of one token's `size` numbers with their scales and offsets."""
    together, width = _PACKS[bits]
    return math.ceil(size / together) * width + 2 * SCALE.itemsize * (size // scale_group(size))
