"""The order of a layer's slots, as pure functions.

Once RoPE is in the keys, the order of slots is free. A buffer is

    [ padding | kept, not core | core | system ][ text sinks | text window, newest ]
                                              ^ T0

so what an ordinary step attends to is a contiguous suffix view. The left part is right-aligned
at `T0`, the text part left-aligned, each row of the batch with its own counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING, STORED, CORE, SYSTEM = 0, 1, 2, 3


@dataclass(frozen=True)
class RowPlan:
    """Token counts of one row in one layer: what stays after prefill, and the text's limit.

    `vision` includes `core`; `limit` is the most text tokens the row may hold (None = no
    limit), the first `sink` of which are never evicted.
    """

    system: int
    vision: int
    core: int
    text: int
    sink: int
    limit: int | None


def left_classes(kept: Tensor, core: Tensor, system: Tensor) -> Tensor:
    """Class of each token for the left part; arguments are bool `[B, G, N]`."""
    return torch.where(system, SYSTEM, torch.where(core, CORE, torch.where(kept, STORED, PADDING)))


def left_order(classes: Tensor, length: int) -> Tensor:
    """Token indices `[B, G, length]` of the left part, classes ascending, positions inside."""
    return classes.argsort(dim=-1, stable=True)[..., classes.shape[-1] - length :]


def text_kept(is_text: Tensor, plans: list[RowPlan]) -> Tensor:
    """bool `[B, N]`: each row's first `sink` and newest text tokens, `plan.text` in all."""
    index = is_text.long().cumsum(dim=1) - 1
    count = is_text.sum(dim=1, keepdim=True)
    kept = is_text.new_tensor([[plan.text] for plan in plans], dtype=torch.long)
    sink = is_text.new_tensor([[min(plan.sink, plan.text)] for plan in plans], dtype=torch.long)
    return is_text & ((index < sink) | (index >= count - (kept - sink)))


def text_order(kept: Tensor, length: int) -> Tensor:
    """Token indices `[B, length]` of the text part, left-aligned, positions ascending."""
    return (~kept).long().argsort(dim=-1, stable=True)[..., :length]


def swaps(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Slot pairs `[B, G, m]` whose exchange turns the class order `old` into `new`.

    `old` is sorted by class and `new` has the same number of slots of each class in every row;
    only STORED and CORE change places. A row that needs fewer than `m` exchanges repeats its last
    pair, and one that needs none gets a slot with itself; `exchange` bears both.
    """
    leaving = (old == CORE) & (new == STORED)
    entering = (old == STORED) & (new == CORE)
    counts = leaving.sum(dim=-1, keepdim=True)
    most = int(counts.max())
    first = (~leaving).long().argsort(dim=-1, stable=True)[..., :most]
    second = (~entering).long().argsort(dim=-1, stable=True)[..., :most]
    place = torch.arange(most, device=old.device).expand_as(first).minimum(counts - 1).clamp(min=0)
    first, second = first.gather(-1, place), second.gather(-1, place)
    return first, torch.where(counts > 0, second, first)


def exchange(buffer: Tensor, first: Tensor, second: Tensor) -> None:
    """Exchange slots `first` and `second` (`[B, G, m]`) of `buffer [B, H, C, ...]` in place.

    `G` is 1 (the same slots in every head) or `H`. A pair may repeat, or name one slot twice.
    """
    shape = (buffer.shape[0], buffer.shape[1], first.shape[-1])
    a, b = first.expand(shape), second.expand(shape)
    if buffer.ndim == 4:
        a, b = (i[..., None].expand(*shape, buffer.shape[3]) for i in (a, b))
    held_a, held_b = buffer.gather(2, a), buffer.gather(2, b)
    buffer.scatter_(2, a, held_b).scatter_(2, b, held_a)


def take(states: Tensor, order: Tensor) -> Tensor:
    """The tokens `order [B, G, n]` of `states [B, H, N, D]`, `G` being 1 or `H`."""
    index = order.expand(-1, states.shape[1], -1)[..., None].expand(-1, -1, -1, states.shape[3])
    return states.gather(2, index)
