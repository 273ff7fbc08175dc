"""One row a layer: the summary of a profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


def per_layer(frames: Mapping[str, pd.DataFrame], layers: int) -> pd.DataFrame:
    """One row a layer; means over samples, NaN where nothing was recorded.

    `vision_last` and `vision_decode` are attention on vision by the last prompt row and while
    decoding. The others are of decoding steps, or of the last prompt row in a run without:
    `coverage_90` (share of vision tokens), `overlap_8` (drift), `window_95` (text tokens),
    `entropy` (nat).
    """
    vision = frames["mass"].query("modality == 'vision'")
    query = answered(frames)

    def column(name: str, **where: Any) -> pd.Series[float]:
        table = vision if name == "vision" else frames[name]
        for key, value in where.items():
            table = table[table[key] == value]
        return table.set_index("layer")["mean"]

    found = pd.DataFrame(
        {
            "vision_last": column("vision", query="last"),
            "vision_decode": column("vision", query="generated"),
            "coverage_90": column("coverage", query=query, level=90),
            "overlap_8": column("drift", lag=8),
            "window_95": column("window", query=query, level=95),
            "entropy": column("entropy", query=query),
        },
        index=pd.RangeIndex(layers, name="layer"),
    )
    return found.reset_index()


def answered(frames: Mapping[str, pd.DataFrame]) -> str:
    """The query rows that stand for the answer: `generated`, or `last` in a run without decoding."""
    return "generated" if (frames["entropy"]["query"] == "generated").any() else "last"
