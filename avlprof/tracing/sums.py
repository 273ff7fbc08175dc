"""Running sums of row statistics, and their means as columns of the stats table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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


def joined_sums(before: Sums, latest: Sums, anew: str) -> Sums:
    """The sums of both, kind by kind; of the kind `anew`, which stands last, those of `latest` alone."""
    kept = {kind: count for kind, count in before.kinds.items() if kind != anew}
    names = [kind for kind in dict.fromkeys([*kept, *latest.kinds]) if kind != anew]
    names += [anew] if anew in latest.kinds else []
    whole = Sums({kind: kept.get(kind, 0) + latest.kinds.get(kind, 0) for kind in names})
    for name in ("values", "coverage"):
        parts = [
            (own, table.to(_device(latest)))
            for own, table in ((kept, getattr(before, name)), (latest.kinds, getattr(latest, name)))
            if table is not None
        ]
        if parts:
            nothing = torch.zeros_like(parts[0][1][:, 0])
            # `kept` lacks `anew`, which stands last, so its numbers are those of the table
            columns = [
                sum((table[:, list(own).index(kind)] for own, table in parts if kind in own), nothing)
                for kind in names
            ]
            setattr(whole, name, torch.stack(columns, dim=1))
    return whole


def _device(sums: Sums) -> torch.device:
    assert sums.values is not None
    return sums.values.device


def all_finite(many: Sequence[Sums]) -> bool:
    """Whether every sum of values of all layers is a finite number; waits once for each device."""
    together: dict[Any, list[Tensor]] = defaultdict(list)
    for sums in many:
        if sums.values is not None:
            together[sums.values.device, sums.values.dtype, sums.values.shape].append(sums.values)
    return all(bool(torch.stack(values).isfinite().all()) for values in together.values())


def frames(many: Sequence[Sums], options: RecordOptions) -> list[list[dict[str, Any]]]:
    """Of each layer's sums, rows of the stats table: `query, rows, head`, and the columns of the statistics.

    Layers that have measured the same rows are worked out together.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in many]
    together: dict[Any, list[int]] = defaultdict(list)
    for index, sums in enumerate(many):
        if sums.values is not None:
            known = sums.coverage is None, sums.overlap is None
            together[tuple(sums.kinds.items()), tuple(sums.pairs), sums.values.shape, known].append(index)
    for indices in together.values():
        group = [many[index] for index in indices]
        numbers, bins = _numbers(group, options)
        labels: Sequence[int] = range(numbers.shape[1]) if options.per_head else [ALL_HEADS]
        distance = numbers[..., bins].astype(np.float32)
        table = np.delete(numbers, bins, axis=-1).tolist()
        names = [
            *FIXED,
            *(f"coverage_{level}" for level in options.coverages),
            *(f"overlap_{lag}" for lag in options.lags),
        ]
        for layer, index in enumerate(indices):
            for kind, (query, count) in enumerate(group[0].kinds.items()):
                for head, label in enumerate(labels):
                    key = {
                        "query": query,
                        "rows": count,
                        "head": label,
                        "distance": distance[layer, head, kind],
                    }
                    found[index].append(key | dict(zip(names, table[layer][head][kind], strict=True)))
    return found


def _numbers(group: Sequence[Sums], options: RecordOptions) -> tuple[NDArray[np.float64], slice]:
    """The statistics `[L, H or 1, K, C]` of some layers, and which of them are the distance bins."""
    rows = np.array(list(group[0].kinds.values()), dtype=np.float64)
    means = _stacked(group, "values") / rows[:, None]
    covered = np.full((*means.shape[:3], len(options.coverages)), np.nan)
    if group[0].coverage is not None:
        both = _stacked(group, "coverage")
        covered = _ratio(both[..., : len(options.coverages)], both[..., len(options.coverages) :])
    overlap = np.full((*means.shape[:3], len(options.lags)), np.nan)
    if group[0].overlap is not None:
        overlap = _ratio(_stacked(group, "overlap"), np.array(group[0].pairs, dtype=np.float64))
    numbers = np.concatenate([means, covered, overlap], axis=-1)
    if not options.per_head:
        numbers = _mean(numbers)
    return numbers, slice(len(FIXED), means.shape[-1])


def _stacked(group: Sequence[Sums], name: str) -> NDArray[np.float64]:
    """fp64 `[L, ...]` of one of their sums, on the host."""
    return np.asarray(torch.stack([getattr(sums, name) for sums in group]).cpu(), dtype=np.float64)


def _added(sums: Tensor | None, values: Tensor, kinds: Tensor, heads: slice, total: int) -> Tensor:
    added = kinds @ values
    if sums is None and len(added) == total:
        return added
    if sums is None:
        sums = added.new_zeros((total, *added.shape[1:]))
    sums[heads] += added
    return sums


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the heads of `[L, H, ...]`; those without a value are left out, NaN where none has one."""
    seen = ~np.isnan(values)
    total = np.where(seen, values, 0.0).sum(axis=1, keepdims=True)
    return _ratio(total, seen.sum(axis=1, keepdims=True).astype(np.float64))


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=ratios, where=np.broadcast_to(counts > 0, sums.shape))
    return ratios
