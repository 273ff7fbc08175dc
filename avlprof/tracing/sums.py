"""Running sums of row statistics, and their means as columns of the stats table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avlprof.attention.modality import MODALITIES
from avlprof.runs.meta import LEARNED_SINK
from avlprof.tracing.options import RecordOptions

FIXED = (*(f"mass_{name}" for name in MODALITIES), "mass_sink", LEARNED_SINK, "entropy", "text_sink")
ALL_HEADS = -1


class Sums:
    """Sums over the query rows of one layer and phase, by query head and kind of row.

    A row's values are `FIXED` and then the distance bins; `values [H, K, C]`. A row that gives
    vision nothing has no coverage, so `coverage [H, K, 2 * levels]` is sums and counts. `overlap
    [H, K, lags]` is of decoding steps, `pairs` how many of them each lag compares.
    """

    def __init__(self, kinds: dict[str, int]) -> None:
        self.kinds = kinds
        self.values: Tensor | None = None
        self.coverage: Tensor | None = None
        self.overlap: Tensor | None = None
        self.pairs: list[int] = []

    def add(self, values: Tensor, kinds: Tensor, heads: slice, total: int) -> None:
        """Take values `[h, R, C]` of some of the `total` heads, and which kinds `[K, R]` the rows are."""
        self.values = _added(self.values, values.double(), kinds, heads, total)

    def add_coverage(self, counts: Tensor, kinds: Tensor, heads: slice, total: int) -> None:
        """Take token counts `[h, R, levels]`, NaN where a row has none."""
        seen = counts == counts
        both = torch.cat([torch.where(seen, counts, 0.0).double(), seen.double()], dim=-1)
        self.coverage = _added(self.coverage, both, kinds, heads, total)

    @property
    def is_finite(self) -> bool:
        """Whether every sum of values is a finite number; waits for the device."""
        return self.values is None or bool(self.values.isfinite().all())

    def frame(self, options: RecordOptions) -> Iterator[dict[str, Any]]:
        """Rows of the stats table: `query, rows, head`, and the columns of the statistics."""
        if self.values is None:
            return
        rows = np.array(list(self.kinds.values()), dtype=np.float64)
        means = np.asarray(self.values.cpu()) / rows[:, None]
        kinds = (*means.shape[:2],)
        covered = np.full((*kinds, len(options.coverages)), np.nan)
        if self.coverage is not None:
            covered = _ratio(*np.split(np.asarray(self.coverage.cpu()), 2, axis=-1))
        overlap = np.full((*kinds, len(options.lags)), np.nan)
        if self.overlap is not None:
            overlap = _ratio(np.asarray(self.overlap.cpu()), np.array(self.pairs, dtype=np.float64))
        numbers = np.concatenate([means, covered, overlap], axis=-1)
        labels: Sequence[int] = range(len(numbers))
        if not options.per_head:
            numbers, labels = _mean(numbers)[None], [ALL_HEADS]
        bins = slice(len(FIXED), means.shape[-1])
        distance = numbers[..., bins].astype(np.float32)
        table = np.delete(numbers, bins, axis=-1).tolist()
        names = [
            *FIXED,
            *(f"coverage_{level}" for level in options.coverages),
            *(f"overlap_{lag}" for lag in options.lags),
        ]
        for kind, (query, count) in enumerate(self.kinds.items()):
            for index, head in enumerate(labels):
                key = {"query": query, "rows": count, "head": head, "distance": distance[index, kind]}
                yield key | dict(zip(names, table[index][kind], strict=True))


def _added(sums: Tensor | None, values: Tensor, kinds: Tensor, heads: slice, total: int) -> Tensor:
    added = kinds @ values
    if sums is None and len(added) == total:
        return added
    if sums is None:
        sums = added.new_zeros((total, *added.shape[1:]))
    sums[heads] += added
    return sums


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over heads `[H, ...]`; heads without a value are left out, NaN where none has one."""
    seen = ~np.isnan(values)
    return _ratio(np.where(seen, values, 0.0).sum(axis=0), seen.sum(axis=0).astype(np.float64))


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=ratios, where=np.broadcast_to(counts > 0, sums.shape))
    return ratios
