"""One pass over the vision scores of a run: coverage curves, overlap of layers and heads, concentration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from avlprof.analysis.concentration import STATISTICS, concentration
from avlprof.analysis.coverage import Array, as_shares, mass_curves, share_grid
from avlprof.analysis.head_overlap import HeadOverlaps
from avlprof.analysis.intervals import Moments
from avlprof.analysis.overlap import layer_overlap
from avlprof.runs import RunDirectory

CURVES = ("last", "instruction", "step", "answer")
SETS = ("last", "step")
ROWS = ("last", "instruction", "step")
SCORES = {"last", "instruction", "decode"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scanned:
    """Tables of the vision scores, each with `mean, low, high, n`.

    `curves`: `layer, query, share_kept`; `overlap`: `layer_a, layer_b, query`; `concentration`:
    `layer, query, statistic`; `heads`: as in `head_overlap`, empty in a run of head averages. Of
    the queries, `step` is a single decoding step (mean over steps), `answer` what all steps of an
    answer attend to taken together.
    """

    curves: pd.DataFrame
    overlap: pd.DataFrame
    concentration: pd.DataFrame
    heads: pd.DataFrame


def scan_scores(
    run: RunDirectory, samples: Sequence[str], most: int, progress: Progress | None = None
) -> Scanned:
    """Coverage curves, overlaps and concentration, from the scores of each sample in turn.

    Rows in which no layer looks at vision count as not recorded.

    Args:
        run: the traced run; samples may differ in their number of vision tokens.
        samples: ids to read.
        most: largest number of vision tokens of a sample.
        progress: called with samples done and their total.
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
            "answer": as_shares(steps.sum(axis=0, keepdims=True)) if len(steps) else steps,
        }
        curves.add(np.stack([_mean_curve(rows[name], grid) for name in CURVES], axis=1))
        overlaps.add(np.stack([layer_overlap(rows[name], run.meta.top_share) for name in SETS], axis=2))
        spreads.add(np.stack([concentration(rows[name]) for name in ROWS], axis=1))
        if run.meta.per_head:
            heads.add(scores)
        if progress:
            progress(done, len(samples))
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
