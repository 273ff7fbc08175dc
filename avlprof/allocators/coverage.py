"""Every layer keeps what it needs to cover one common share of its attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.bisection import largest_share
from avlprof.errors import UserError


@dataclass(frozen=True)
class Coverage(Allocator):
    """One threshold p for all layers; each keeps the fewest tokens that hold p of its attention.

    p is found by bisection so that the mean over layers meets the target.

    Source: PrefixKV, arXiv 2412.03409, checked against the authors' code: the fewest keys whose
    sorted scores add up to p, and p by binary search. There scores are sums over all rows of the
    prompt and over all keys, one search a sample, and the ratios of samples are averaged; here
    they are those of the rows that decode, over vision tokens, and the curves are averaged. The code
    also scales the counts to the target, which tokens of fractional size make needless here.
    FitPrune, arXiv 2409.10197, finds one share by the same search in its authors' code, but cuts
    tokens that are low in text-to-vision and in vision-to-vision attention, head maxima, for all
    later layers.
    """

    def shares(self, evidence: Evidence, target: float) -> Array:
        if evidence.coverage is None:
            raise UserError(
                "allocator 'coverage' needs the coverage curves of a profile; "
                "analyze a run first or use allocator 'uniform'"
            )
        return covering_shares(evidence.coverage, _threshold(evidence.coverage, target))


def covering_shares(coverage: Array, threshold: float) -> Array:
    """Smallest kept share `[layers]` that covers `threshold`, linear between tokens.

    `coverage [layers, N]` is as in `Evidence`. A threshold that a curve misses by rounding
    means all of its tokens.
    """
    layers, tokens = coverage.shape
    before = np.concatenate([np.zeros((layers, 1)), coverage], axis=1)
    whole = np.minimum((coverage < threshold).sum(axis=1), tokens - 1)
    row = np.arange(layers)
    low, high = before[row, whole], coverage[row, whole]
    step = np.where(high > low, high - low, 1.0)
    part = np.where(high > low, np.clip((threshold - low) / step, 0.0, 1.0), 0.0)
    shares: Array = (whole + part) / tokens
    return shares


def _threshold(coverage: Array, target: float) -> float:
    """The largest threshold at which the layers keep `target` or less on average."""

    def fits(threshold: float) -> bool:
        return bool(covering_shares(coverage, threshold).mean() <= target)

    return 1.0 if fits(1.0) else largest_share(fits, 0.0, 1.0, halvings=60)
