"""Which rows of a prompt are measured, and for what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.tracing.columns import Columns
from avlprof.tracing.measure import UNSEEN

KINDS = {"system": Modality.SYSTEM, "vision": Modality.VISION, "text": Modality.TEXT}
RECEIVED = ("last", "instruction", "all")
WORTH_A_BLOCK = 1 << 14  # weights a head that a further block must save
MOST_ROWS = 256  # of a block: longer ones would form many weights that no row may see


@dataclass(frozen=True)
class Block:
    """Rows of a prompt that are measured together.

    `rows [R]` ascend; `bins` is theirs as in `Columns`, `order` their place among the text tokens.
    `kinds [K, R]` is 1 where a row is of a kind; `covered [C]` indexes the rows that are measured
    for coverage and `covered_kinds [K, C]` tells their kinds; `received [3, R]` is 1 where a row
    counts for each of `RECEIVED`; `is_text` indexes the text rows. `later [R, last - first]` is
    `UNSEEN` on keys that come after a row, 0 elsewhere, from the key behind `first` on: those
    before are seen by all. `first` and `last` are the bounds of the rows, on the host.
    """

    first: int
    last: int
    rows: Tensor
    order: Tensor
    bins: Tensor
    later: Tensor
    kinds: Tensor
    covered: Tensor
    covered_kinds: Tensor
    received: Tensor
    is_received: bool
    is_text: Tensor


class RowPlan:
    """The rows of a prompt that are measured: once each, also where a row is of two kinds."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        options = self.options = columns.options
        rows = {kind: (columns.codes == code).nonzero()[:, 0] for kind, code in KINDS.items()}
        if options.rows != "all":
            rows["vision"] = _spread(rows["vision"], options.vision_rows)
        rows["last"] = torch.tensor([columns.count - 1])
        self._places = {kind: places for kind, places in rows.items() if len(places)}
        self.rows = torch.tensor(sorted({row for places in self._places.values() for row in places.tolist()}))

    @property
    def kinds(self) -> dict[str, int]:
        """How many rows of each kind are measured; kinds without any are left out."""
        return {kind: len(places) for kind, places in self._places.items()}

    @cached_property
    def _marks(self) -> tuple[Tensor, Tensor, Tensor]:
        """bool `[K, R]` kinds and covered rows of each kind, and `[3, R]` received."""
        places = self._places
        kinds = torch.stack([torch.isin(self.rows, p) for p in places.values()])
        sparse = [_spread(p, self.options.coverage_rows) for p in places.values()]
        covered = torch.stack([torch.isin(self.rows, p) for p in sparse])
        text = self.columns.codes[self.rows] == Modality.TEXT
        last = self.rows == self.columns.count - 1
        every = torch.full_like(last, self.options.rows == "all")
        return kinds, covered, torch.stack([last, text, every])

    def blocks(self, most: int) -> list[Block]:
        """The rows in blocks of at most `most`, made once."""
        known = self._known.get(most)
        if known is None:
            known = self._known[most] = [self._block(*bounds) for bounds in self._bounds(most)]
        return known

    @cached_property
    def _known(self) -> dict[int, list[Block]]:
        return {}

    def _bounds(self, most: int) -> list[tuple[int, int]]:
        """First and last row of each block.

        A block measures its rows against all keys up to its last row, so it ends early where the
        next rows see many more.
        """
        rows = self.rows.tolist()
        bounds, start = [], 0
        for i in range(1, len(rows) + 1):
            full = i == len(rows) or i - start >= most
            if full or (i - start) * (rows[min(i + most, len(rows)) - 1] - rows[i - 1]) >= WORTH_A_BLOCK:
                bounds.append((start, i))
                start = i
        return bounds

    def _block(self, start: int, stop: int) -> Block:
        device = self.columns.device
        kinds, covered, received = (marks[:, start:stop] for marks in self._marks)
        rows = self.rows[start:stop]
        first, last = int(rows[0]), int(rows[-1])
        chosen = covered.any(dim=0).nonzero()[:, 0]

        def there(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.to(device, dtype, non_blocking=True)

        return Block(
            first=first,
            last=last,
            rows=there(rows, torch.long),
            bins=self.columns.bins(rows),
            later=there((torch.arange(first + 1, last + 1) > rows[:, None]) * UNSEEN, torch.float32),
            order=there(self.columns.order[rows], torch.long),
            kinds=there(kinds, torch.float64),
            covered=there(chosen, torch.long),
            covered_kinds=there(covered[:, chosen], torch.float64),
            received=there(received, torch.float32),
            is_received=bool(received.any()),
            is_text=there(received[1].nonzero()[:, 0], torch.long),
        )


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` evenly spaced entries, first and last included."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]
