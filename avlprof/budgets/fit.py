"""From relative shares to token counts that meet a total: the normaliser of every allocation.

Tokens are handed out in one fixed order, so a larger total takes no token from any layer.
Largest-remainder rounding would not have that property (the Alabama paradox); rounding at a
common divisor (Sainte-Laguë) does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from avlprof.errors import UserError
from avlprof.policy import tokens as tokens_of

Counts = NDArray[np.int64]


def fit_keep(shares: Sequence[float], target: float, tokens: int, floor: float = 0.0) -> tuple[float, ...]:
    """Kept shares in proportion to `shares`, within [`floor`, 1], whose mean is `target`.

    Args:
        shares: relative share of each layer; all zero means uniform.
        target: mean kept share over layers, in [0, 1].
        tokens: vision tokens N that the shares are turned into counts of.
        floor: smallest kept share of a layer. Above `target` it cannot hold, and the result is uniform.

    Returns:
        One ratio a layer, of 6 decimals; `policy.tokens(ratio, N)` is the count meant. The counts
        sum to `floor(target * N * layers + 1e-6)`.

    Raises:
        UserError: a share, the target or the floor is out of range.
    """
    check_unit("target", target)
    check_unit("floor", floor)
    layers = len(shares)
    total = min(tokens_of(target, tokens * layers), tokens * layers)
    counts = hand_out(shares, total, np.full(layers, floor_count(floor, tokens)), np.full(layers, tokens))
    return tuple(ratio_of(int(count), tokens) for count in counts)


def hand_out(shares: Sequence[float], total: int, floors: Counts, caps: Counts) -> Counts:
    """Integer counts in proportion to `shares` that sum to `total`, between `floors` and `caps`.

    Floors that add up to more than `total` are filled evenly as far as it goes. Layers of share
    0 get more than their floor only once all others are full. Each count never falls when `total`
    rises. `floors`, `caps` and the result are `[layers]`; `total` is at most the sum of caps.
    """
    weights = np.asarray(shares, dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise UserError(f"relative shares must be finite and not negative, got {list(shares)}")
    floors = np.minimum(floors, caps)
    if total <= floors.sum():
        return _rise(np.zeros_like(floors), floors, np.ones(len(weights)), total)
    weights = weights / weights.max() if weights.max() > 0 else np.ones(len(weights))
    weights[weights < 1e-9] = 0.0
    used = weights > 0
    reach = int(np.where(used, caps, floors).sum())
    counts = _rise(floors, np.where(used, caps, floors), weights, min(total, reach))
    return counts if total <= reach else _rise(counts, caps, np.ones(len(weights)), total)


def floor_count(floor: float, tokens: int) -> int:
    """Fewest tokens that are at least `floor` of `tokens`."""
    return min(math.ceil(floor * tokens - 1e-6), tokens)


def ratio_of(count: int, tokens: int) -> float:
    """The smallest ratio of 6 decimals that means `count` of `tokens`; 0 of 0 tokens is 1.0."""
    if count >= tokens:
        return 1.0
    ratio = math.ceil(count / tokens * 1e6 - 1e-6) / 1e6
    while tokens_of(ratio, tokens) < count:
        ratio = round(ratio + 1e-6, 6)
    return ratio


def check_unit(name: str, value: float) -> None:
    """`UserError` unless the value lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{name} must be in [0, 1], got {value}")


def _rise(low: Counts, high: Counts, weights: NDArray[np.float64], total: int) -> Counts:
    """Counts `clip(round(level * weights), low, high)` at the level where they sum to `total`.

    Layers that would take the next token at the very same level get it in layer order.
    """

    def at(level: float) -> Counts:
        counts: Counts = np.clip(np.floor(level * weights + 0.5), low, high).astype(np.int64)
        return counts

    below, above = 0.0, 1.0
    while at(above).sum() < total:
        above *= 2.0
    if at(above).sum() == total:
        return at(above)
    while below < (middle := (below + above) / 2) < above:
        if at(middle).sum() <= total:
            below = middle
        else:
            above = middle
    counts = at(below)
    tied = at(above) - counts
    before = np.concatenate([[0], np.cumsum(tied)[:-1]])
    filled: Counts = counts + np.clip(total - counts.sum() - before, 0, tied)
    return filled
