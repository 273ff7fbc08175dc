"""How a row's vision attention is spread over the vision tokens: three numbers that allocators use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


STATISTICS = ("sparsity", "entropy", "skewness")
NEGLIGIBLE = 0.01  # of the row's largest score; the threshold of VL-Cache


def concentration(scores: NDArray[np.float32] | Array) -> Array:
    """Sparsity, entropy and skewness of vision scores, mean over rows.

    - `sparsity`: share of the vision tokens with less than 1% of the row's largest score
      (VL-Cache, arXiv 2410.23317).
    - `entropy`: in nat, of the scores divided by their sum (MEDA, arXiv 2502.17599); its
      exponential is the effective number of tokens.
    - `skewness`: adjusted Fisher-Pearson coefficient, after AirCache (arXiv 2503.23956), whose own
      formula was not at hand; 0 with fewer than three tokens.

    A row that gives vision nothing needs no token: it counts as sparsity 1, entropy 0, skewness 0.

    Args:
        scores: `[R, L, N]` of R query rows, not negative.

    Returns:
        `[L, 3]` in the order of `STATISTICS`; NaN without rows.
    """
    rows, layers, _ = scores.shape
    if not rows:
        return np.full((layers, len(STATISTICS)), np.nan)
    exact = scores.astype(np.float64)
    looks = exact.sum(axis=-1) > 0
    found = np.stack(
        [np.where(looks, _sparsity(exact), 1.0), _entropy(exact), np.where(looks, _skewness(exact), 0.0)],
        axis=-1,
    )
    mean: Array = found.mean(axis=0)
    return mean


def _sparsity(scores: Array) -> Array:
    share: Array = (scores < NEGLIGIBLE * scores.max(axis=-1, keepdims=True)).mean(axis=-1)
    return share


def _entropy(scores: Array) -> Array:
    total = scores.sum(axis=-1, keepdims=True)
    shares = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy: Array = -(shares * logs).sum(axis=-1)
    return entropy


def _skewness(scores: Array) -> Array:
    count = scores.shape[-1]
    if count < 3:
        return np.zeros(scores.shape[:-1])
    away = scores - scores.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((away**2).sum(axis=-1) / (count - 1))
    # equal scores differ by rounding alone
    spread = deviation > 1e-9 * scores.max(axis=-1)
    cubes = (away**3).sum(axis=-1) * count / ((count - 1) * (count - 2))
    skewness: Array = np.divide(cubes, deviation**3, out=np.zeros_like(cubes), where=spread)
    return skewness
