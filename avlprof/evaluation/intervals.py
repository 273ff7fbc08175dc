"""How sure a mean is: intervals, paired differences, and the drop that n samples can detect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avlprof.policy import Score

CONFIDENCE = 0.95
RESAMPLES = 2000
FLIPS = 10_000
EXACT_LIMIT = 13  # 2**13 sign patterns are fewer than FLIPS
_BLOCK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `a - b` over the same samples, its interval and how surprising it is.

    `p_value` is that of a two-sided sign-flip permutation test: the share of sign patterns of the
    differences whose mean is at least as far from zero. `sd` is the sample standard deviation
    of the differences (NaN for one sample).
    """

    difference: Score
    p_value: float
    sd: float


def mean_interval(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Score:
    """Mean of one number a sample, with the 95% percentile bootstrap interval (Efron, 1979).

    Samples are resampled, so the interval speaks of other samples of the same kind; it says
    nothing about another task. It is too narrow for few samples (under about 20), and has no
    width when all values are equal.

    Args:
        values: `[n]`, finite, n >= 1.
        seed: of the resampling; the same values and seed give the same interval.

    Raises:
        ValueError: no values, or one is not finite.
    """
    data = _checked(values)
    mean = float(data.mean())
    if np.ptp(data) == 0.0:
        return Score(mean=mean, low=mean, high=mean, samples=data.size)
    means = _resampled_means(data, seed, resamples)
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Score(mean=mean, low=float(low), high=float(high), samples=data.size)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int = 0) -> PairedDifference:
    """How much higher `a` is than `b`, both `[n]` with the same sample at the same place.

    Up to 13 samples all sign patterns are counted, beyond that 10,000 random ones are (and then
    the p-value is never below 1/10,001).

    Raises:
        ValueError: lengths differ, no values, or one is not finite.
    """
    first, second = _checked(a), _checked(b)
    if first.size != second.size:
        raise ValueError(f"paired values must have one length, got {first.size} and {second.size}")
    differences = first - second
    sd = float(differences.std(ddof=1)) if differences.size > 1 else math.nan
    return PairedDifference(mean_interval(differences, seed), _sign_flip(differences, seed), sd)


def detectable_drop(n: int, sd: float, power: float = 0.8) -> float:
    """Smallest drop of a mean that `n` paired samples show with this power, at 5% two-sided.

    `(z(0.975) + z(power)) * sd / sqrt(n)`, `sd` being that of the paired differences: the normal
    approximation (Cohen, *Statistical Power Analysis*, 1988).

    Raises:
        ValueError: n is below 1, or sd is negative or not finite.
    """
    if n < 1 or not math.isfinite(sd) or sd < 0:
        raise ValueError(f"detectable_drop needs n >= 1 and a finite sd >= 0, got n={n}, sd={sd}")
    normal = NormalDist()
    reach = normal.inv_cdf(1.0 - (1.0 - CONFIDENCE) / 2) + normal.inv_cdf(power)
    return reach * sd / math.sqrt(n)


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64).ravel()
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError("a mean needs at least one value, and finite ones")
    return data


def _resampled_means(data: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    parts = [
        data[random.integers(0, data.size, (rows, data.size))].mean(axis=1) for rows in _rows(data, resamples)
    ]
    return np.concatenate(parts)


def _sign_flip(differences: NDArray[np.float64], seed: int) -> float:
    moved = differences[differences != 0.0]
    if moved.size == 0:
        return 1.0
    seen = abs(moved.sum()) * (1.0 - 1e-9)
    if moved.size <= EXACT_LIMIT:
        patterns = (np.arange(2**moved.size)[:, None] >> np.arange(moved.size)) & 1
        return float((np.abs((1 - 2 * patterns) @ moved) >= seen).mean())
    random = np.random.default_rng(seed)
    extreme = 0
    for rows in _rows(moved, FLIPS):
        signs = random.integers(0, 2, (rows, moved.size), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= seen).sum())
    return (extreme + 1) / (FLIPS + 1)


def _rows(data: NDArray[np.float64], total: int) -> Sequence[int]:
    """How many of `total` rows as long as `data` to draw at a time, so that memory stays bounded."""
    most = max(_BLOCK // data.size, 1)
    return [min(most, total - start) for start in range(0, total, most)]
