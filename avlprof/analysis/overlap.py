"""Do layers attend to the same vision tokens?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avlprof.policy import tokens

Array = NDArray[np.float64]


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
