"""What a profile tells allocators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.allocators import Evidence
from avlprof.errors import UserError

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

Use = Literal["store", "compute"]
Array = NDArray[np.float64]

# first choice first: a prompt may have no text behind its pictures, a run no decoding
_SCORED = {"store": ("instruction", "last"), "compute": ("step", "instruction", "last")}
_TRACED = {"store": ("text", "last"), "compute": ("generated", "text", "last")}


def evidence(profile: Profile, use: Use = "store") -> Evidence:
    """What allocators may look at.

    To `store`, a layer must serve the prompt's last row and the whole answer, so its coverage
    curve is the lower of `last` and `answer`; the other statistics are of the prompt's text rows
    (behind the first picture), as in the papers that use them. To `compute`, it must serve a
    single decoding step, and all are of those. What a run lacks is taken from the last prompt row.

    Raises:
        UserError: no sample has vision tokens.
    """
    curves = profile.frames["coverage_curve"]
    if curves.empty:
        raise UserError(
            f"run {profile.meta.run} has no vision tokens to spread a budget over; trace with images"
        )
    tokens = int(profile.frames["samples"]["vision"].max())
    spread = _of(profile.frames["concentration"], _SCORED[use]).pivot(
        index="layer", columns="statistic", values="mean"
    )
    mass = _of(profile.frames["mass"].query("modality == 'vision'"), _TRACED[use])
    return Evidence(
        layers=profile.layers,
        tokens=tokens,
        coverage=_coverage(curves, use, tokens),
        vision_mass=mass.set_index("layer")["mean"].to_numpy(np.float64),
        entropy=spread["entropy"].to_numpy(np.float64),
        sparsity=spread["sparsity"].to_numpy(np.float64),
        skewness=spread["skewness"].to_numpy(np.float64),
    )


def _of(table: pd.DataFrame, queries: tuple[str, ...]) -> pd.DataFrame:
    """The rows of the first of the queries that the table has."""
    query = next(query for query in queries if (table["query"] == query).any())
    return table[table["query"] == query]


def _coverage(curves: pd.DataFrame, use: Use, tokens: int) -> Array:
    """`[layers, tokens]` as in `Evidence`."""
    wanted = {"store": ("last", "answer"), "compute": ("step",)}[use]
    found = [query for query in wanted if (curves["query"] == query).any()] or ["last"]
    tables = [
        curves[curves["query"] == query].pivot(index="layer", columns="share_kept", values="mean")
        for query in found
    ]
    counts = np.arange(1, tokens + 1) / tokens
    lower = np.minimum.reduce([table.to_numpy() for table in tables])
    shares = np.concatenate([[0.0], tables[0].columns.to_numpy(dtype=np.float64)])
    return np.stack([np.interp(counts, shares, np.concatenate([[0.0], row])) for row in lower])
