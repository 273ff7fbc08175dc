"""What a decoding step of a layer sees of its slots: contiguous views, and masks where rows differ."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from avlprof.attention.call import Bounds
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
        self._firsts: dict[bool, Tensor] = {}
        self._lasts: Tensor | None = None
        self._claimed: list[int] = []
        self._last: Tensor | None = None

    def span(self, counts: list[int], whole: bool) -> tuple[int, int]:
        """Slots from and to, of rows that hold `counts` text tokens."""
        return self.left - max(self._lefts[whole]), self.left + max(counts)

    def reach(self, seen: int) -> int:
        """A number above the logical positions of all vision, of a layer that has `seen` so many tokens."""
        return seen

    def mask(self, counts: list[int], whole: bool, capacity: int, device: torch.device) -> Tensor | None:
        """Bool `[B, 1, 1, n]` over the view's slots; None if all rows hold all of them."""
        lefts = self._lefts[whole]
        if len(set(lefts)) == 1 and len(set(counts)) == 1:
            return None
        if whole not in self._masks:
            self._masks[whole] = self._seen(counts, whole, capacity, device)
        start, end = self.span(counts, whole)
        return self._masks[whole][..., start:end]

    def bounds(self, counts: list[int], whole: bool, device: torch.device) -> Bounds | None:
        """What the mask says, as the first and the last slot that each row holds; None without a mask."""
        if whole not in self._masks:
            return None
        if self._lasts is None:
            self._lasts = self._last_slots(counts, device)
        if whole not in self._firsts:
            self._firsts[whole] = self._first_slots(whole, device)
        return Bounds(self._firsts[whole], self._lasts, self.span(counts, whole)[0])

    def _first_slots(self, whole: bool, device: torch.device) -> Tensor:
        return per_row([self.left - behind for behind in self._lefts[whole]], device).flatten()

    def _last_slots(self, counts: list[int], device: torch.device) -> Tensor:
        return per_row([self.left + count - 1 for count in counts], device).flatten()

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
            if self._lasts is not None:
                self._lasts.clamp_(min=slot)
            return slot
        if self._last is not None and claimed == [before + 1 for before in self._claimed]:
            slots = self._last.add_(1)
        else:
            slots = self._last = per_row([self.left + at for at in claimed], device)
        self._claimed = claimed
        self._hold(slots)
        return slots

    def _hold(self, slots: Tensor) -> None:
        """Rows hold their slots `[B, 1, 1]` from now on."""
        for mask in self._masks.values():
            mask.scatter_(3, slots[..., None], True)
        if self._lasts is not None:
            torch.maximum(self._lasts, slots.flatten(), out=self._lasts)

    def forget_masks(self) -> None:
        """Capacity changed."""
        self._masks = {}


_FINEST = 32  # slots that extents are rounded to; large ones to a sixteenth


def rounded(count: int) -> int:
    """`count` slots rounded up: to multiples of 32, and of large counts to a sixteenth at most."""
    step = max(_FINEST, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


@dataclass(frozen=True)
class Extents:
    """How long the parts of a layer's fixed buffers are: rounded up, so that nearby prompts share them.

    `left` are the slots of the left part, `near` those of them that an ordinary step sees, `text` those
    of the text part. `masked`: whether rows hold less than an ordinary step's view, and a refresh's. `core`
    are bounds of its size and of the exchanges of a refresh, and whether all rows have a core of that
    size; None where no step picks a core. `stored` are the slots of what few bits store beside the left
    part, and whether rows hold as many, `words` the same of system and text: no slots where nothing is.
    `reach` is above the positions of vision that are told to other layers at a refresh; 0 where none are.
    """

    left: int
    near: int
    text: int
    masked: tuple[bool, bool]
    core: tuple[int, int, bool] | None
    stored: tuple[int, bool] = (0, True)
    words: tuple[int, bool] = (0, True)
    reach: int = 0

    @classmethod
    def of(
        cls,
        plans: list[RowPlan],
        counts: list[int],
        most: list[int],
        has_core: bool,
        packs: bool = False,
        told: int = 0,
    ) -> Extents:
        """Of rows that hold `counts` text tokens now, and up to `most` while the extents serve.

        `has_core`: steps ask where its vision and core lie. `packs`: what is not core is stored in few bits,
        beside the left part. `told`: positions below it are told.
        """
        nears, beside = [p.system + p.core for p in plans], [p.vision - p.core for p in plans]
        wholes = nears if packs else [p.system + p.vision for p in plans]
        left, near, text = rounded(max(wholes)), rounded(max(nears)), max(most)
        free = min(counts) < text
        core = None
        if has_core:
            cores = [plan.core for plan in plans]
            size = rounded(max(cores))
            exchanges = max(min(plan.core, plan.vision - plan.core) for plan in plans)
            core = size, min(rounded(exchanges), left), min(cores) == size
        masked = free or min(nears) < near, has_core and (free or min(wholes) < left)
        stored, words = _even(beside if packs else [0]), _even([plan.low for plan in plans])
        return cls(left, near, text, masked, core, stored, words, rounded(told))


def _even(counts: list[int]) -> tuple[int, bool]:
    """Slots for `counts` tokens a row, and whether all rows have as many."""
    slots = rounded(max(counts))
    return slots, min(counts) == slots


@dataclass
class HeldSlots:
    """What says on the device which slots rows hold, at fixed places: see `Windows` and `FixedWindows`.

    `slots [B, 1, 1]` are those that the rows' tokens go to; `firsts` and `lasts [B]` are there where kernels
    run.
    """

    slots: Tensor
    masks: dict[bool, Tensor] = field(default_factory=dict)
    firsts: dict[bool, Tensor] = field(default_factory=dict)
    lasts: Tensor | None = None


class FixedWindows(Windows):
    """Views that stay as long as they are while steps are captured and replayed.

    A mask hides what a row does not hold of a view. It lives on the device like the slots `[B, 1, 1]`
    that the rows' tokens go to; whoever replays steps fills these.
    """

    def __init__(self, plans: list[RowPlan], extents: Extents, held: HeldSlots) -> None:
        super().__init__(plans, extents.left)
        self._extents, self._slots, self._masks = extents, held.slots, held.masks
        self._firsts, self._lasts = held.firsts, held.lasts

    def refill(self, counts: list[int]) -> None:
        """Make masks and bounds those of rows that hold `counts` text tokens, where they lie."""
        capacity, device = self.left + self._extents.text, self._slots.device
        for whole, mask in self._masks.items():
            mask.copy_(self._seen(counts, whole, capacity, device))
        if self._lasts is not None:
            self._lasts.copy_(self._last_slots(counts, device))
            for whole, firsts in self._firsts.items():
                firsts.copy_(self._first_slots(whole, device))

    def fit(self, slots: list[int]) -> bool:
        """Whether these text slots lie within the views."""
        return max(slots) < self._extents.text

    def span(self, counts: list[int], whole: bool) -> tuple[int, int]:
        left = self._extents.left if whole else self._extents.near
        return self.left - left, self.left + self._extents.text

    def reach(self, seen: int) -> int:
        return self._extents.reach

    def mask(self, counts: list[int], whole: bool, capacity: int, device: torch.device) -> Tensor | None:
        start, end = self.span(counts, whole)
        mask = self._masks.get(whole)
        return None if mask is None else mask[..., start:end]

    def slot(self, claimed: list[int], device: torch.device) -> Slot:
        self._hold(self._slots)
        return self._slots
