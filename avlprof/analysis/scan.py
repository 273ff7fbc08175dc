"""One pass over a run's token scores: overlap of layers, and how concentrated attention is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.analysis.coverage import Array, as_shares, mass_curves, share_grid
from avlprof.analysis.heads import HeadOverlaps
from avlprof.analysis.intervals import Moments
from avlprof.policy import tokens
from avlprof.runs import RunDirectory
from avlprof.watch import SILENT, Watch


def layer_overlap(shares: Array, top_share: float) -> Array:
    """PPCI between layers: overlap of their top sets, `|T1 n T2| / |T|`.

    Source: A-VL, arXiv 2409.14846 (percentile concordance index).

    Args:
        shares: vision scores `[R, L, N]` of R query rows.
        top_share: the sets are the best `max(1, floor(top_share * N))` tokens; of equal scores the
            lower position is better.

    Returns:
        `[L, L]`, mean over rows; NaN where a layer gives vision no attention in any row.
    """
    _, layers, count = shares.shape
    size = max(1, tokens(top_share, count))
    best = np.argsort(-shares, axis=-1, kind="stable")[..., :size]
    member = np.zeros(shares.shape, dtype=np.float32)
    np.put_along_axis(member, best, 1.0, axis=-1)
    looks = (shares.sum(axis=-1) > 0).astype(np.float64)
    member *= looks[..., None].astype(np.float32)
    common = sum((m @ m.T for m in member), np.zeros((layers, layers)))
    pairs = looks.T @ looks
    overlap: Array = np.divide(common, pairs * size, out=np.full((layers, layers), np.nan), where=pairs > 0)
    return overlap


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
    curves = np.stack(
        [np.where(looks, _sparsity(exact), 1.0), _entropy(exact), np.where(looks, _skewness(exact), 0.0)],
        axis=-1,
    )
    mean: Array = curves.mean(axis=0)
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


CURVES = ("last", "instruction", "step", "answer")
SETS = ("last", "step")
ROWS = ("last", "instruction", "step")
SCORES = {"last", "instruction", "decode"}


@dataclass(frozen=True)
class Scanned:
    """Tables of the vision scores, each with `mean, low, high, n`.

    `curves`: `layer, query, share_kept`; `overlap`: `layer_a, layer_b, query`; `concentration`:
    `layer, query, statistic`; `heads`: as in `head_overlap`, empty in a run of head averages. Of
    the queries, `step` is a single decoding step (mean over steps), `answer` what all steps of an
    answer attend to taken together: their weights are added up and not renormalised step by step,
    so that a step that hardly looks at the picture counts as little as it looks.
    """

    curves: pd.DataFrame
    overlap: pd.DataFrame
    concentration: pd.DataFrame
    heads: pd.DataFrame


def scan_scores(run: RunDirectory, samples: Sequence[str], most: int, watch: Watch = SILENT) -> Scanned:
    """Coverage curves, overlaps and concentration, from the scores of each sample in turn.

    Rows in which no layer looks at vision count as not recorded.

    Args:
        run: the traced run; samples may differ in their number of vision tokens.
        samples: ids to read.
        most: largest number of vision tokens of a sample.
        watch: its phase `analyze` counts samples.
    """
    layers, grid = range(run.meta.layers), share_grid(max(most, 1))
    curves = Moments((len(layers), len(CURVES), len(grid)))
    overlaps = Moments((len(layers), len(layers), len(SETS)))
    spreads = Moments((len(layers), len(ROWS), len(STATISTICS)))
    heads = HeadOverlaps(len(layers), run.meta.heads, run.meta.top_share)
    names = SCORES | set(heads.NAMES if run.meta.per_head else ())
    for done, sample in enumerate(samples, start=1):
        scores = run.scores(sample, names)
        steps = _recorded(scores["decode"])
        rows = {
            "last": _recorded(scores["last"][None]),
            "instruction": _recorded(scores["instruction"][None]),
            "step": steps,
            "answer": as_shares(scores["decode"].sum(axis=0, keepdims=True, dtype=np.float64))[: len(steps)],
        }
        curves.add(np.stack([_mean_curve(rows[name], grid) for name in CURVES], axis=1))
        overlaps.add(np.stack([layer_overlap(rows[name], run.meta.top_share) for name in SETS], axis=2))
        spreads.add(np.stack([concentration(rows[name]) for name in ROWS], axis=1))
        if run.meta.per_head:
            heads.add(scores)
        watch.phase("analyze", done, len(samples))
    return Scanned(
        curves.table({"layer": layers, "query": CURVES, "share_kept": grid}),
        overlaps.table({"layer_a": layers, "layer_b": layers, "query": SETS}),
        spreads.table({"layer": layers, "query": ROWS, "statistic": STATISTICS}),
        heads.table(),
    )


def _recorded(scores: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Array:
    """Shares `[R, L, N]` of the rows in which some layer looks at vision."""
    return as_shares(scores[scores.sum(axis=(1, 2)) > 0])


def _mean_curve(shares: Array, grid: Array) -> Array:
    """Curve `[L, G]`, mean over rows `[R, L, N]`; NaN without rows."""
    if not len(shares):
        return np.full((shares.shape[1], len(grid)), np.nan)
    mean: Array = mass_curves(shares, grid).mean(axis=0)
    return mean
