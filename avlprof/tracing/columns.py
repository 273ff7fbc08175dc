"""Columns of attention: where a row has its tokens, groups of keys, and what is measured of each row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from avlprof.attention.modality import MODALITIES, Modality
from avlprof.tracing import statistics
from avlprof.tracing.options import RecordOptions


class TokenColumns:
    """The columns of one row that hold tokens; bool `real [n]`, on the host, marks them."""

    def __init__(self, real: Tensor) -> None:
        self._index = real.nonzero()[:, 0]
        self._total = len(real)
        first = int(self._index[0]) if len(self._index) else 0
        without_gap = len(self._index) > 0 and int(self._index[-1]) - first == len(self._index) - 1
        self._run = slice(first, first + len(self._index)) if without_gap else None
        self._there: dict[torch.device, Tensor] = {}

    def grow(self, real: Tensor) -> None:
        """Further columns follow."""
        self._there = {}
        if self._run is not None and self._run.stop == self._total and bool(real.all()):
            self._run = slice(self._run.start, self._total + len(real))
        else:
            self._index = self._columns()
            self._index = torch.cat([self._index, real.nonzero()[:, 0] + self._total])
            self._run = None
        self._total += len(real)

    def columns(self, device: torch.device) -> Tensor | slice:
        """All of them: a slice, which copies nothing, where they have no gap."""
        if self._run is not None:
            return self._run
        if device not in self._there:
            self._there[device] = self._index.to(device, non_blocking=True)
        return self._there[device]

    def _columns(self) -> Tensor:
        return self._index if self._run is None else torch.arange(self._run.start, self._run.stop)


@dataclass(frozen=True)
class Columns:
    """The keys of one sample, in order and without padding.

    `codes [N]` are `Modality` codes and stay in host memory, so that positions and counts can be
    read without waiting for a device; what rows are measured with lies on `device`.
    """

    codes: Tensor
    device: torch.device
    options: RecordOptions

    @property
    def count(self) -> int:
        """Keys in all."""
        return len(self.codes)

    @cached_property
    def groups(self) -> Tensor:
        """fp32 `[5, N]`: 1 on keys of each modality, and on the first position."""
        hot = (self.codes == torch.arange(4, dtype=self.codes.dtype)[:, None]).float()
        first = torch.zeros(1, self.count)
        first[:, :1] = 1.0
        return torch.cat([hot, first]).to(self.device, non_blocking=True)

    @cached_property
    def order(self) -> Tensor:
        """int64 `[N]`, on the host: number of text and generated tokens up to each position, less one."""
        return self._is_text.long().cumsum(dim=0) - 1

    @cached_property
    def shares(self) -> Tensor:
        """fp64 levels of coverage."""
        return (torch.tensor(self.options.coverages, dtype=torch.float64) / 100).to(
            self.device, non_blocking=True
        )

    def bin_bounds(self, rows: Tensor) -> Tensor:
        """`statistics.distance_bins` of the rows at these positions, on the host as they are."""
        count = len(self.text)
        first = min(self.options.text_sink, count)
        return statistics.distance_bins(self.order[rows], self.options.distances, first, count)

    def bins(self, rows: Tensor) -> Tensor:
        """`bin_bounds` on the device."""
        return self.bin_bounds(rows).to(self.device, non_blocking=True)

    @cached_property
    def vision(self) -> Selection:
        """The vision tokens."""
        return Selection.of(self.codes == Modality.VISION, self.device)

    @cached_property
    def text(self) -> Selection:
        """Text of the prompt behind the first picture, and generated tokens."""
        return Selection.of(self._is_text, self.device)

    @cached_property
    def _is_text(self) -> Tensor:
        return (self.codes == Modality.TEXT) | (self.codes == Modality.GENERATED)


@dataclass(frozen=True)
class Selection:
    """Some columns, ascending: a slice where they have no gap, which is a view instead of a copy."""

    positions: Tensor  # on the host
    index: Tensor | slice

    @classmethod
    def of(cls, chosen: Tensor, device: torch.device) -> Selection:
        """The columns that bool `chosen [N]`, on the host, marks."""
        positions = chosen.nonzero()[:, 0]
        if len(positions) and int(positions[-1] - positions[0]) == len(positions) - 1:
            return cls(positions, slice(int(positions[0]), int(positions[-1]) + 1))
        return cls(positions, positions.to(device, non_blocking=True))

    def __len__(self) -> int:
        return len(self.positions)

    def of_first(self, values: Tensor) -> Tensor:
        """The chosen columns of `values [..., n]`, which holds the first n columns alone."""
        if isinstance(self.index, slice):
            return values[..., self.index]
        count = int(torch.searchsorted(self.positions, values.shape[-1]))
        return values[..., self.index[:count]]


UNSEEN = -1e30  # logit of a key that a row may not see: finite, and its weight is 0


def row_values(
    logits: Tensor, weights: Tensor, columns: Columns, bins: Tensor, sunk: bool
) -> tuple[Tensor, Tensor]:
    """What is known of each row, in the order of `sums.FIXED` and the distance bins.

    Args:
        logits: `[H, R, n]` over the first n keys, `UNSEEN` where a row may not look.
        weights: their softmax.
        bins: the rows' `statistics.distance_bins`.
        sunk: learned sinks took part in the softmax; what the weights lack to 1 is theirs.

    Returns:
        `[H, R, C]`, and the weights on text `[H, R, T]`.
    """
    length = weights.shape[-1]
    # groups first: multiplying by so few columns takes three times as long the other way around
    masses = (columns.groups[:, :length] @ weights.view(-1, length).mT).mT.view(*weights.shape[:2], -1)
    total = masses[..., : len(MODALITIES)].sum(dim=-1) if sunk else None
    learned = torch.zeros_like(masses[..., :1]) if total is None else (1.0 - total).clamp(min=0.0)[..., None]
    spread = statistics.entropy(logits, weights, total)[..., None]
    text = columns.text.of_first(weights)
    sink, distance = statistics.text_distances(text, bins)
    return torch.cat([masses, learned, spread, sink, distance], dim=-1), text
