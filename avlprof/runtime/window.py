"""The slots that a step attends to: a view of the buffers, and a mask where rows of a batch differ."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.runtime.layout import RowPlan, per_row

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
