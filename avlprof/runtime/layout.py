"""The order of a layer's slots, as pure functions.

Once RoPE is in the keys, the order of slots is free. A buffer is

    [ padding | kept, not core | core | system ][ text and generated, sinks first ]
                                              ^ T0

so what an ordinary step attends to is a contiguous suffix view. The left part is right-aligned
at `T0`, the text part left-aligned, each row of the batch with its own counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.modality import Modality

PADDING, STORED, CORE, SYSTEM, TEXT = 0, 1, 2, 3, 4
_BLOCK = 1024  # slots moved at once, few enough for a CPU's cache; even, so that a pair stays together

Items = NDArray[Any]


@dataclass(frozen=True)
class RowPlan:
    """Token counts of one row in one layer: what stays after prefill, and the text's limit.

    `vision` includes `core`; `limit` is the most text tokens the row may hold (None = no
    limit, or one that grows with the text), the first `sink` of which are never evicted. `low_system`
    and `low_text` are those that few bits store, apart from the others.
    """

    system: int
    vision: int
    core: int
    text: int
    sink: int
    limit: int | None
    low_system: int = 0
    low_text: int = 0

    @property
    def low(self) -> int:
        """System and text tokens in few bits."""
        return self.low_system + self.low_text


def merged(before: list[RowPlan], new: list[RowPlan], texts: list[int]) -> list[RowPlan]:
    """Plans after a turn that adds `new` to those `before` it (none at first), with `texts` text tokens."""
    if not before:
        return [replace(plan, text=text) for plan, text in zip(new, texts, strict=True)]
    return [
        replace(
            b,
            system=a.system + b.system,
            vision=a.vision + b.vision,
            core=a.core + b.core,
            text=text,
            sink=a.sink,
            low_system=a.low_system + b.low_system,
            low_text=a.low_text + b.low_text,
        )
        for a, b, text in zip(before, new, texts, strict=True)
    ]


def per_row(counts: list[int], device: torch.device) -> Tensor:
    """`counts` as a tensor `[B, 1, 1]` on a device, without making the host wait for it."""
    if len(set(counts)) == 1:
        return torch.full((len(counts), 1, 1), counts[0], device=device)
    values = torch.tensor(counts).view(-1, 1, 1)
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def within(positions: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Whether positions lie in one of the spans, from and to."""
    return torch.stack([(positions >= start) & (positions < end) for start, end in spans]).any(dim=0)


def slot_classes(
    plans: list[RowPlan], texts: list[int], left: int, width: int, device: torch.device
) -> Tensor:
    """Class of each of the first `width` slots, `[B, 1, width]`; `texts` are the rows' text tokens."""
    column = torch.arange(width, device=device)
    edges = [
        (PADDING, [p.system + p.vision for p in plans]),
        (STORED, [p.system + p.core for p in plans]),
        (CORE, [p.system for p in plans]),
    ]
    classes = torch.full((len(plans), 1, width), SYSTEM, device=device)
    for code, behind in reversed(edges):
        classes = classes.masked_fill(column < left - per_row(behind, device), code)
    text = column < left + per_row(texts, device)
    return torch.where(column < left, classes, torch.where(text, TEXT, PADDING))


def whole_classes(modality: Tensor) -> Tensor:
    """Class of each token of a prompt `[B, N]` that stays as a whole, `[B, 1, N]`; all vision is core."""
    codes = {Modality.SYSTEM: SYSTEM, Modality.VISION: CORE, Modality.TEXT: TEXT}
    classes = torch.full_like(modality, PADDING, dtype=torch.long)
    for code, own in codes.items():
        classes = classes.masked_fill(modality == code, own)
    return classes[:, None]


def left_order(classes: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """Columns `[B, G, length]` of the left part: classes ascending, and positions inside a class.

    What comes before the columns of a class is padding, and of no matter. Positions are None where they
    ascend with the columns.
    """
    classes = classes.masked_fill(classes == TEXT, PADDING)
    order = _by_position(classes, positions)
    spare = length - order.shape[-1]  # a part of fixed length may be longer than all that there is
    return order[..., -spare:] if spare <= 0 else pad(order, (spare, 0))


def text_order(classes: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """Columns `[B, G, length]` of the text part, left-aligned, positions ascending; None as above."""
    return _by_position((classes != TEXT).long(), positions)[..., :length]


def _by_position(classes: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None:
        return classes.argsort(dim=-1, stable=True)
    by_position = positions.argsort(dim=-1, stable=True)
    by_class = classes.gather(-1, by_position).argsort(dim=-1, stable=True)
    return by_position.gather(-1, by_class)


def swaps(old: Tensor, new: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Slot pairs `[B, G, most]` whose exchange turns the core `old` into `new`, of fixed shape.

    `old [B, 1, n]` and `new [B, G, n]` are bool and have the same number of slots in every row;
    `most` is a bound of the exchanges that is known ahead. A row that needs fewer exchanges repeats
    its last pair, and one that needs none gets a slot with itself; `exchange` bears both.
    """
    leaving, entering = old & ~new, new & ~old
    counts = leaving.sum(dim=-1, keepdim=True)
    first = (~leaving).long().argsort(dim=-1, stable=True)[..., :most]
    second = (~entering).long().argsort(dim=-1, stable=True)[..., :most]
    pair = torch.arange(most, device=old.device).expand_as(first).minimum(counts - 1).clamp(min=0)
    first, second = first.gather(-1, pair), second.gather(-1, pair)
    return first, torch.where(counts > 0, second, first)


def exchange(buffer: Tensor, first: Tensor, second: Tensor) -> None:
    """Exchange slots `first` and `second` (`[B, G, m]`) of `buffer [B, H, C, ...]` in place.

    `G` is 1 (the same slots in every head) or `H`. A pair may repeat, or name one slot twice.
    """
    a, b = _spread(first, buffer), _spread(second, buffer)
    at_a, at_b = buffer.gather(2, a), buffer.gather(2, b)
    buffer.scatter_(2, a, at_b).scatter_(2, b, at_a)


def exchange_counted(buffers: tuple[Tensor, ...], old: Tensor, new: Tensor) -> None:
    """Exchange the slots that leave the core with those that enter it, in place, as many as there are.

    `buffers [B, H, C, ...]` are contiguous and on the CPU; `old` and `new` are as in `swaps`. The host
    asks how many there are, which costs nothing there.
    """
    (rows, groups, first), second = (old & ~new).nonzero().unbind(1), (new & ~old).nonzero()[:, 2]
    moves: dict[int, tuple[Items, Items]] = {}
    for buffer in buffers:
        heads, capacity = buffer.shape[1:3]
        if heads not in moves:
            start = (rows * heads + groups) * capacity
            if heads > new.shape[1]:
                start = start + torch.arange(0, heads * capacity, capacity, device=buffer.device)[:, None]
            pairs = torch.stack([start + first, start + second], dim=-1)
            moves[heads] = pairs.flatten().numpy(), pairs.flip(-1).flatten().numpy()
        slots = _as_items(buffer)
        for at in range(0, len(moves[heads][0]), _BLOCK):
            target, source = (part[at : at + _BLOCK] for part in moves[heads])
            slots[target] = np.take(slots, source, mode="clip")


def _as_items(buffer: Tensor) -> Items:
    """All slots of a contiguous buffer as one array, each an item of bytes: numpy moves them whole."""
    slots = math.prod(buffer.shape[:3])
    width = buffer.numel() // slots * buffer.itemsize
    return buffer.detach().view(slots, -1).view(torch.uint8).numpy().view(np.dtype((np.void, width)))[:, 0]


def move(buffer: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots `source` of `buffer [B, H, C, ...]` over `target` in place; both `[B, 1 or H, m]`."""
    buffer.scatter_(2, _spread(target, buffer), buffer.gather(2, _spread(source, buffer)))


def put(buffer: Tensor, slots: Tensor, states: Tensor) -> None:
    """Write `states [B, H, m, ...]` into the slots `[B, G, m]` of `buffer [B, H, C, ...]`."""
    buffer.scatter_(2, _spread(slots, buffer), states)


def take(states: Tensor, order: Tensor) -> Tensor:
    """The tokens `order [B, G, n]` of `states [B, H, N, ...]`, `G` being 1 or `H`."""
    return states.gather(2, _spread(order, states))


def take_into(states: Tensor, order: Tensor, buffer: Tensor) -> None:
    """`take` into the first slots of `buffer [B, H, C, ...]`; zeros into its others."""
    count = order.shape[-1]
    torch.gather(states, 2, _spread(order, states), out=buffer[:, :, :count])
    buffer[:, :, count:].zero_()


def _spread(slots: Tensor, buffer: Tensor) -> Tensor:
    """Slots as an index of a buffer's dimension 2."""
    shape = (buffer.shape[0], buffer.shape[1], slots.shape[-1])
    index = slots.expand(shape)
    return index if buffer.ndim == 3 else index[..., None].expand(*shape, buffer.shape[3])
