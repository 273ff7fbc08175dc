"""Layers get tokens, and bits, where having fewer was measured to hurt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.bisection import largest_share
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


def split_bytes(
    evidence: Evidence, room: float, prices: Mapping[int, float]
) -> tuple[Array, tuple[int, ...]]:
    """Kept shares `[layers]` and bits of each layer whose measured damage is the least at a price.

    A layer that keeps the share k in b bits is taken to cost what the probe measured of k in full precision
    (`damage`, made convex) and of all in b bits (`bit_damage`), and costs of layers to add up; layers trade
    one against the other at one exchange rate, found by bisection. Source: as `Sensitivity`, with rates of
    distortion as in Y. Shoham and A. Gersho, IEEE Trans. ASSP 36(9), 1988.

    Args:
        evidence: of the layers that policies act on alone (`Evidence.of_governed`).
        room: what may be paid, in layers' worth of vision tokens of 16 bits over the layers, in [0, 1].
        prices: of the bits on offer, what a token takes over one of 16 bits; those that were not probed
            count as free of damage.

    Returns:
        Shares and bits that together take `room` or less. A layer without tokens has the bits that it
        would have with a mean share of them.
    """
    grid = np.linspace(0.0, 1.0, _STEPS + 1)
    levels, damage = evidence.damage_levels, evidence.damage
    known, harm = evidence.bit_levels, evidence.bit_damage
    if levels is None or damage is None or known is None or harm is None:
        raise UserError("bits are split by a sensitivity probe in tokens and in bits; 'avlprof tune' runs it")
    offered, price = list(prices), np.array(list(prices.values()))
    columns = {int(bits): column for column, bits in enumerate(known.tolist())}
    curves = np.stack([_convex(levels, row, grid) for row in damage])
    none = np.zeros(len(harm))
    noise = np.stack([harm[:, columns[b]] if b in columns else none for b in offered], axis=1)
    paid = price[:, None] * grid

    def at(rate: float) -> tuple[Array, NDArray[np.intp], float]:
        cost = curves[:, None, :] + noise[:, :, None] * (grid > 0) + rate * paid
        flat = cost.reshape(len(cost), -1).argmin(axis=1)
        kind, share = np.unravel_index(flat, paid.shape)
        mean = noise + rate * price * room
        kind = np.where(share > 0, kind, mean.argmin(axis=1))
        return grid[share], kind, float((price[kind] * grid[share]).mean())

    power = largest_share(lambda power: at(10.0**-power)[2] <= room, -6.0, 9.0, halvings=50)
    shares, kind, _ = at(10.0**-power)
    return shares, tuple(offered[index] for index in kind)


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
