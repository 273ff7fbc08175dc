"""Where attention goes, by modality, and how spread out it is."""

from __future__ import annotations

import pandas as pd

from avlprof.analysis.intervals import over_samples

KEYS = ["layer", "phase", "query"]


def mass(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of attention by modality: `layer, phase, query, modality, mean, low, high, n`.

    `rows` is a table of `head_mean`. The means of one layer and query sum to 1.
    """
    columns = {f"mass_{name}": name for name in ("system", "vision", "text", "generated")}
    long = rows[[*KEYS, *columns]].rename(columns=columns).melt(KEYS, var_name="modality", value_name="mass")
    return over_samples(long, [*KEYS, "modality"], "mass")


def entropy(rows: pd.DataFrame) -> pd.DataFrame:
    """Row entropy in nat: `layer, phase, query, mean, low, high, n`; `rows` as in `mass`."""
    return over_samples(rows, KEYS, "entropy")
