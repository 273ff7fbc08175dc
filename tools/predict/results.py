"""Rank correlations of what attention says with what eviction was measured to cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]

RESAMPLES = 1000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over `units`, and its 95% interval over samples; NaN is not known."""

    mean: float
    low: float
    high: float
    units: int

    @property
    def text(self) -> str:
        """As a table says it: bold where the interval leaves out 0."""
        if np.isnan(self.mean):
            return ""
        text = f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        return f"**{text}**" if self.low > 0 or self.high < 0 else text


def correlation(told: Array, damage: Array, seed: int = 0) -> Correlation:
    """How well `told` orders what `damage` says, both `[S, U]`: of means over samples.

    The interval is the percentile bootstrap's over samples, which are drawn for both together: it speaks of
    other samples and the same units. A value of `told` that is NaN does not count to its mean.
    """
    samples, units = damage.shape
    rng = np.random.default_rng(seed)
    drawn = [np.arange(samples), *(rng.integers(samples, size=samples) for _ in range(RESAMPLES))]
    found = np.array([_spearman(_mean(told[pick]), damage[pick].mean(axis=0)) for pick in drawn])
    again = found[1:][~np.isnan(found[1:])]
    if np.isnan(found[0]) or not again.size:
        return Correlation(float("nan"), float("nan"), float("nan"), units)
    low, high = np.percentile(again, (2.5, 97.5))
    return Correlation(float(found[0]), float(low), float(high), units)


def by_unit(table: pd.DataFrame, column: str, units: Sequence[str]) -> Array:
    """A column of a table with a row a sample and unit as `[S, U]`."""
    wide = table.pivot_table(index="sample", columns=list(units), values=column, dropna=False, sort=True)
    found: Array = wide.to_numpy(dtype=float)
    return found


def _mean(values: Array) -> Array:
    counted = ~np.isnan(values)
    total = np.where(counted, values, 0.0).sum(axis=0)
    mean: Array = np.divide(
        total, counted.sum(axis=0), out=np.full(total.shape, np.nan), where=counted.any(axis=0)
    )
    return mean


def _spearman(a: Array, b: Array) -> float:
    known = ~(np.isnan(a) | np.isnan(b))
    first, second = rankdata(a[known]), rankdata(b[known])
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
