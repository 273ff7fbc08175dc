"""Layers get tokens where dropping them was measured to hurt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError

_STEPS = 200


@dataclass(frozen=True)
class Sensitivity(Allocator):
    """Water-filling over measured damage curves.

    `evidence.damage[l, i]` is what it costs (KL to dense) when layer l alone keeps the share
    `evidence.damage_levels[i]`. Assuming that layers' costs add up, shares go step by step to the
    layer whose curve falls most per token; curves are made convex first, so the greedy answer is
    the optimum. Source: marginal analysis of separable convex allocation (B. Fox, Operations
    Research 14(3), 1966); layer by layer probing as in AdaKV-like budget searches.
    """

    def shares(self, evidence: Evidence, target: float) -> Array:
        if evidence.damage is None or evidence.damage_levels is None:
            raise UserError("allocator 'sensitivity' needs a sensitivity probe, which 'avlprof tune' runs")
        grid = np.linspace(0.0, 1.0, _STEPS + 1)
        curves = [_convex(evidence.damage_levels, row, grid) for row in evidence.damage]
        gains = np.stack([-np.diff(curve) for curve in curves])
        order = np.argsort(-gains.T, axis=None, kind="stable")
        taken = order[: round(target * _STEPS * evidence.layers)]
        counts = np.bincount(taken % evidence.layers, minlength=evidence.layers)
        return counts / _STEPS


def _convex(levels: Array, damage: Array, grid: Array) -> Array:
    """The largest convex, falling curve under the measured points, on `grid`."""
    points = sorted(zip(levels.tolist(), np.minimum.accumulate(damage).tolist(), strict=True))
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return np.interp(grid, [x for x, _ in hull], [y for _, y in hull])
