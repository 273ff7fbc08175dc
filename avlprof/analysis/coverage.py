"""How few vision tokens hold how much of the vision attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.analysis.intervals import over_samples
from avlprof.analysis.tables import KEYS

Array = NDArray[np.float64]


def coverage(rows: pd.DataFrame, vision: pd.Series[int], levels: Sequence[int]) -> pd.DataFrame:
    """Fewest vision tokens that hold a share of a row's vision attention, as traced.

    Args:
        rows: a table of `head_mean`, with columns `coverage_<level>` in tokens.
        vision: vision tokens by sample id; samples without any are left out.
        levels: shares in percent.

    Returns:
        `layer, phase, query, level, mean, low, high, n` as shares of the vision tokens, and
        `tokens`, the mean count.
    """
    count = rows["sample"].map(vision)
    tables = []
    for level in levels:
        covered = rows[KEYS].assign(tokens=rows[f"coverage_{level}"].where(count > 0))
        covered["share"] = covered["tokens"] / count
        table = over_samples(covered, KEYS, "share")
        table.insert(len(KEYS), "level", level)
        tables.append(table.assign(tokens=over_samples(covered, KEYS, "tokens")["mean"]))
    return pd.concat(tables, ignore_index=True).sort_values([*KEYS, "level"], ignore_index=True)


def share_grid(most: int) -> Array:
    """Kept shares in (0, 1] at which curves of up to `most` vision tokens are stored.

    Every count up to 256 tokens; beyond that 1% steps, and finer ones where curves are steep.
    """
    counts = np.arange(1, most + 1)
    if most > 256:
        fine = np.geomspace(1, most, 96).round().astype(int)
        counts = np.union1d(fine, np.linspace(0, most, 101).round().astype(int)[1:])
    grid: Array = counts / most
    return grid


def as_shares(scores: NDArray[np.float32] | Array) -> Array:
    """Scores `[..., N]` divided by their sum; rows without any mass stay zero."""
    exact = scores.astype(np.float64)
    total = exact.sum(axis=-1, keepdims=True)
    shares: Array = np.divide(exact, total, out=np.zeros_like(exact), where=total > 0)
    return shares


def mass_curves(shares: Array, grid: Array) -> Array:
    """Share of mass that the best-scored `grid` share of tokens holds: `[..., N]` to `[..., G]`.

    Linear between tokens. A row without mass has nothing to cover, so that any number of tokens
    covers it: its curve is 1 throughout.
    """
    tokens = shares.shape[-1]
    ranked = -np.sort(-shares, axis=-1)
    mass = np.concatenate([np.zeros((*shares.shape[:-1], 1)), ranked.cumsum(axis=-1)], axis=-1)
    position = grid * tokens
    whole = np.minimum(np.floor(position + 1e-9).astype(int), tokens)
    part = np.clip(position - whole, 0.0, 1.0)
    low, high = mass[..., whole], mass[..., np.minimum(whole + 1, tokens)]
    curves = np.minimum(low + part * (high - low), 1.0)
    curves[..., grid >= 1.0] = 1.0
    empty = shares.sum(axis=-1, keepdims=True) <= 0
    full: Array = np.where(empty, 1.0, curves)
    return full
