"""Slots of the core exchanged on the device: what changes is counted there, and nothing else is moved.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _PAIRS = 1024, 16  # that a program takes at a time


def triton_exchange(buffers: tuple[Tensor, Tensor, Tensor], old: Tensor, new: Tensor, most: int) -> None:
    """Turn the core `old` into `new` by exchanging slots of all buffers in place, in two launches.

    The first lists each row's leaving and entering slots, the second moves them; programs whose pairs
    do not exist return at once, so that the bytes moved are those of what changes. Nothing waits for
    the device, and the launches are the same whatever changes, so that they can be captured.

    Args:
        buffers: keys `[B, H, C, D]`, values `[B, H, C, E]` and positions int64 `[B, 1 or H, C]`; the
            last dimensions are contiguous.
        old: bool `[B, 1, n]`, with the same number of slots in a row as `new`.
        new: bool `[B, G, n]`, `G` being 1 or `H`.
        most: a bound of the exchanges of a row, known ahead.
    """
    keys, values, positions = buffers
    batch, heads, _, size = keys.shape
    groups, columns = new.shape[1:]
    if most == 0:
        return
    pairs = torch.empty((batch * groups, 2, most), dtype=torch.int32, device=keys.device)
    counts = torch.empty(batch * groups, dtype=torch.int32, device=keys.device)
    with torch.cuda.device(keys.device if keys.is_cuda else -1):
        core_pairs[(batch * groups,)](
            old.contiguous().view(torch.uint8), new.contiguous().view(torch.uint8), pairs, counts,
            groups, columns, most, block=_COLUMNS,
        )  # fmt: skip
        exchange_pairs[(triton.cdiv(most, _PAIRS), batch * heads)](
            keys, values, positions, pairs, counts,
            *keys.stride()[:3], *values.stride()[:3], *positions.stride()[:2],
            heads, groups, positions.shape[1], most, size, values.shape[3],
            block=_PAIRS, width=triton.next_power_of_2(max(size, values.shape[3])),
        )  # fmt: skip


@triton.jit
def core_pairs(old, new, pairs, counts, groups, columns, most, block: tl.constexpr):
    """The slots of one row that leave the core, and those that enter it, each in order."""
    index = tl.program_id(0).to(tl.int64)
    leaves, enters = 0, 0
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        was = tl.load(old + index // groups * columns + column, mask=column < columns, other=0) != 0
        will = tl.load(new + index * columns + column, mask=column < columns, other=0) != 0
        leaving, entering = (was & (will == 0)).to(tl.int32), (will & (was == 0)).to(tl.int32)
        first = leaves + tl.cumsum(leaving, axis=0) - 1
        second = enters + tl.cumsum(entering, axis=0) - 1
        line = pairs + index * 2 * most
        tl.store(line + first, column, mask=(leaving != 0) & (first < most))
        tl.store(line + most + second, column, mask=(entering != 0) & (second < most))
        leaves += tl.sum(leaving, axis=0)
        enters += tl.sum(entering, axis=0)
    tl.store(counts + index, tl.minimum(tl.minimum(leaves, enters), most))


@triton.jit
def exchange_pairs(
    keys, values, positions, pairs, counts,
    key_b, key_h, key_n, value_b, value_h, value_n, position_b, position_h,
    heads, groups, position_heads, most, key_size, value_size,
    block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Exchange some pairs of slots of one head of one row."""
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    own = b * groups + tl.where(groups > 1, h, 0)
    count = tl.load(counts + own)
    begin = tl.program_id(0) * block
    if begin < count:
        pair = begin + tl.arange(0, block)
        there = pair < count
        d = tl.arange(0, width)
        first = tl.load(pairs + own * 2 * most + pair, mask=there, other=0).to(tl.int64)
        second = tl.load(pairs + own * 2 * most + most + pair, mask=there, other=0).to(tl.int64)
        line = keys + b * key_b + h * key_h + d[None, :]
        mask = there[:, None] & (d < key_size)[None, :]
        x = tl.load(line + first[:, None] * key_n, mask=mask)
        y = tl.load(line + second[:, None] * key_n, mask=mask)
        tl.store(line + first[:, None] * key_n, y, mask=mask)
        tl.store(line + second[:, None] * key_n, x, mask=mask)
        line = values + b * value_b + h * value_h + d[None, :]
        mask = there[:, None] & (d < value_size)[None, :]
        x = tl.load(line + first[:, None] * value_n, mask=mask)
        y = tl.load(line + second[:, None] * value_n, mask=mask)
        tl.store(line + first[:, None] * value_n, y, mask=mask)
        tl.store(line + second[:, None] * value_n, x, mask=mask)
        if h < position_heads:
            row = positions + b * position_b + h * position_h
            a = tl.load(row + first, mask=there)
            c = tl.load(row + second, mask=there)
            tl.store(row + first, c, mask=there)
            tl.store(row + second, a, mask=there)
