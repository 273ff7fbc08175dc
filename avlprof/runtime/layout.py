"""The order of a layer's slots, as pure functions.

Once RoPE is in the keys, the order of slots is free. A buffer is

    [ padding | kept, not core | core | system ][ text and generated, sinks first ]
                                              ^ T0

so what an ordinary step attends to is a contiguous suffix view. The left part is right-aligned
at `T0`, the text part left-aligned, each row of the batch with its own counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PADDING, STORED, CORE, SYSTEM, TEXT = 0, 1, 2, 3, 4
_BLOCK = 1024  # slots moved at once, few enough for a CPU's cache; even, so that a pair stays together

Items = NDArray[Any]


@dataclass(frozen=True)
class RowPlan:
    """Token counts of one row in one layer: what stays after prefill, and the text's limit.

    `vision` includes `core`; `limit` is the most text tokens the row may hold (None = no
    limit, or one that grows with the text), the first `sink` of which are never evicted.
    """

    system: int
    vision: int
    core: int
    text: int
    sink: int
    limit: int | None


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


def left_order(classes: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """Columns `[B, G, length]` of the left part: classes ascending, and positions inside a class.

    Positions are None where they ascend with the columns.
    """
    classes = classes.masked_fill(classes == TEXT, PADDING)
    order = _by_position(classes, positions)
    return order[..., order.shape[-1] - length :]


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


def _spread(slots: Tensor, buffer: Tensor) -> Tensor:
    """Slots as an index of a buffer's dimension 2."""
    shape = (buffer.shape[0], buffer.shape[1], slots.shape[-1])
    index = slots.expand(shape)
    return index if buffer.ndim == 3 else index[..., None].expand(*shape, buffer.shape[3])


Slot = int | Tensor


class Windows:
    """An ordinary step's view and a refresh step's (`whole`), of a layer laid out by `plans`.

    The text part begins at slot `left`. A mask is made when rows first differ, and then kept: each
    step adds the slots that it writes.
    """

    def __init__(self, plans: list[RowPlan], left: int) -> None:
        self.left = left
        self._lefts = {
            whole: [p.system + (p.vision if whole else p.core) for p in plans] for whole in (False, True)
        }
        self._masks: dict[bool, Tensor] = {}
        self._claimed: list[int] = []
        self._last: Tensor | None = None

    def span(self, counts: list[int], whole: bool) -> tuple[int, int]:
        """Slots from and to, of rows that hold `counts` text tokens."""
        return self.left - max(self._lefts[whole]), self.left + max(counts)

    def mask(self, counts: list[int], whole: bool, capacity: int, device: torch.device) -> Tensor | None:
        """Bool `[B, 1, 1, n]` over the view's slots; None if all rows hold all of them."""
        lefts = self._lefts[whole]
        if len(set(lefts)) == 1 and len(set(counts)) == 1:
            return None
        if whole not in self._masks:
            self._masks[whole] = self._seen(counts, whole, capacity, device)
        start, end = self.span(counts, whole)
        return self._masks[whole][..., start:end]

    def _seen(self, counts: list[int], whole: bool, capacity: int, device: torch.device) -> Tensor:
        """Bool `[B, 1, 1, capacity]`: which slots each row may look at."""
        column = torch.arange(capacity, device=device)
        begins, ends = self.left - per_row(self._lefts[whole], device), self.left + per_row(counts, device)
        return ((column >= begins) & (column < ends))[:, :, None]

    def slot(self, claimed: list[int], device: torch.device) -> Slot:
        """The slot of each row's token, in its text slot `claimed`: one for all, or `[B, 1, 1]`."""
        if len(set(claimed)) == 1:
            slot = self.left + claimed[0]
            for mask in self._masks.values():
                mask[..., slot] = True
            return slot
        if self._last is not None and claimed == [before + 1 for before in self._claimed]:
            slots = self._last.add_(1)
        else:
            slots = self._last = per_row([self.left + at for at in claimed], device)
        self._claimed = claimed
        for mask in self._masks.values():
            mask.scatter_(3, slots[..., None], True)
        return slots

    def forget_masks(self) -> None:
        """Capacity changed."""
        self._masks = {}


class FixedWindows(Windows):
    """Views that stay as long as they are while steps are captured and replayed.

    The text part of a view has `width` slots. As long as some are free, or where rows differ, a mask
    hides what a row does not hold. It lives on the device like the slots `[B, 1, 1]` that the rows'
    tokens go to; whoever replays steps fills these.
    """

    def __init__(self, plans: list[RowPlan], left: int, counts: list[int], width: int, slots: Tensor) -> None:
        super().__init__(plans, left)
        self.width, self.slots = width, slots
        for whole, lefts in self._lefts.items():
            if min(counts) < width or len(set(lefts)) > 1:
                self._masks[whole] = self._seen(counts, whole, left + width, slots.device)

    def span(self, counts: list[int], whole: bool) -> tuple[int, int]:
        return super().span(counts, whole)[0], self.left + self.width

    def mask(self, counts: list[int], whole: bool, capacity: int, device: torch.device) -> Tensor | None:
        start, end = self.span(counts, whole)
        mask = self._masks.get(whole)
        return None if mask is None else mask[..., start:end]

    def slot(self, claimed: list[int], device: torch.device) -> Slot:
        for mask in self._masks.values():
            mask.scatter_(3, self.slots[..., None], True)
        return self.slots
