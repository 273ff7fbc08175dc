"""Means over samples with two-sided 95% confidence intervals (Student's t, Welch's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]
COLUMNS = ("mean", "low", "high", "n")


def t_interval(mean: Any, variance: Any, n: Any) -> tuple[Array, Array]:
    """Lower and upper end of the 95% interval of a mean; NaN with fewer than two samples.

    `variance` is the sample variance (divisor n - 1); arguments broadcast.
    """
    mean, variance, n = (np.asarray(x, dtype=np.float64) for x in (mean, variance, n))
    many = np.where(n > 1, n, np.nan)
    half = stdtrit(many - 1, 0.975) * np.sqrt(variance / many)
    return mean - half, mean + half


def welch_interval(
    mean: Any, variance: Any, n: Any, other_mean: Any, other_variance: Any, other_n: Any
) -> tuple[Array, Array]:
    """Ends of Welch's 95% interval of the difference of two independent means; NaN below two samples.

    Arguments as in `t_interval`; the difference is the first mean less the other.
    """
    moments = (mean, variance, n, other_mean, other_variance, other_n)
    mean, variance, n, other_mean, other_variance, other_n = (
        np.asarray(x, dtype=np.float64) for x in moments
    )
    n, other_n = np.where(n > 1, n, np.nan), np.where(other_n > 1, other_n, np.nan)
    a, b = variance / n, other_variance / other_n
    squares = a**2 / (n - 1) + b**2 / (other_n - 1)
    # without any variance the interval has no width, whatever the degrees of freedom
    freedom = np.divide((a + b) ** 2, squares, out=np.ones_like(squares), where=squares > 0)
    half = stdtrit(freedom, 0.975) * np.sqrt(a + b)
    return mean - other_mean - half, mean - other_mean + half


def over_samples(table: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """`keys, mean, low, high, n` of a column, one row a sample in; NaN counts as not observed."""
    seen = table.dropna(subset=[value]).astype({value: np.float64})
    table = seen.groupby(list(keys), sort=True)[value].agg(["mean", "var", "count"]).reset_index()
    low, high = t_interval(table["mean"], table["var"], table["count"])
    return table[list(keys)].assign(mean=table["mean"], low=low, high=high, n=table["count"])


class Moments:
    """Running mean and variance of arrays of one shape, one array a sample (Welford).

    NaN entries count as not observed.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._n = np.zeros(shape, dtype=np.int64)
        self._mean = np.zeros(shape)
        self._squares = np.zeros(shape)

    def add(self, values: Array) -> None:
        """Take the array of one more sample."""
        seen = ~np.isnan(values)
        self._n += seen
        step = np.where(seen, values - self._mean, 0.0)
        self._mean += step / np.maximum(self._n, 1)
        self._squares += step * np.where(seen, values - self._mean, 0.0)

    def table(self, axes: Mapping[str, Sequence[Any] | Array]) -> pd.DataFrame:
        """Tidy table `axes, mean, low, high, n`, one key column an axis; unobserved entries are left out."""
        index = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
        low, high = t_interval(self._mean, self._squares / np.maximum(self._n - 1, 1), self._n)
        columns = dict(zip(COLUMNS, (self._mean, low, high, self._n), strict=True))
        table = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index)
        return table[table["n"] > 0].reset_index()
