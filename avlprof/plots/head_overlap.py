"""Do the heads of a layer look at the same vision tokens? (PPCI)"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import NO_VISION, joined, need, samples_note, table, typical_half, whole_layers
from avlprof.plots.heads import HeadInfo, HeadMap, draw_head_maps

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

QUERIES = {"step": "one decoding step", "last": "last prompt token"}
FIGURE = "overlap of heads"


def head_overlap_info(frame: pd.DataFrame, top_share: float | None = None) -> HeadInfo:
    """Overlap of each head's top set within its layer, of decoding steps (of the last prompt row if none).

    The map `shared` is the overlap with the set of the layer's head mean, `others` the mean overlap
    with the layer's other heads.

    Args:
        frame: `profile["head_overlap"]`: `layer_a, head_a, layer_b, head_b, query, mean, low, high`
            (and `n`).
        top_share: size of the sets as a share of the vision tokens; it is also the overlap of
            random sets.

    Raises:
        UserError: a column is missing, no traced sample has vision tokens, or the model has one head.
    """
    columns = ("layer_a", "head_a", "layer_b", "head_b", "query", "mean", "low", "high")
    need(frame, columns, FIGURE, NO_VISION)
    query = "step" if (frame["query"] == "step").any() else "last"
    part = frame[(frame["query"] == query) & (frame["layer_a"] == frame["layer_b"])]
    chosen = {
        "shared": part["head_b"] < 0,
        "others": (part["head_b"] >= 0) & (part["head_b"] != part["head_a"]),
    }
    tables = {
        name: table(need(part[rows], (), FIGURE, "a layer has one head"), "layer_a", "head_a", "mean")
        for name, rows in chosen.items()
    }
    values = {name: wide.to_numpy(dtype=float) for name, wide in tables.items()}
    top = max(float(np.nanmax(one)) for one in values.values()) or 1.0  # one scale, to compare the maps
    maps = tuple(
        HeadMap(name, whole_layers(wide.index), whole_layers(wide.columns), values[name], top)
        for name, wide in tables.items()
    )
    chance = "" if top_share is None else f"sets of the best {top_share:.0%} (random ones: {top_share:.0%})"
    note = joined(samples_note(part), chance)
    half = typical_half(part[chosen["shared"]])
    return HeadInfo(
        "Do the heads of a layer look at the same vision tokens?", maps, QUERIES[query], half, note
    )


def head_overlap(source: Profile | HeadInfo) -> Figure:
    """Two maps of layers by heads: what a head's top vision tokens have in common with its layer's.

    Raises:
        UserError: the run holds averages over heads only.
    """
    if not isinstance(source, HeadInfo):
        source = head_overlap_info(source["head_overlap"], source.meta.settings.top_share)
    return draw_head_maps(source)
