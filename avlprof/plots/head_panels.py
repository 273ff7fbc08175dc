"""Where the single heads of a layer look."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from avlprof.errors import UserError
from avlprof.plots.pictures import (
    Caption,
    HeatInfo,
    Pictures,
    Tiles,
    counted,
    draw_heatmaps,
    heat_info,
    heat_panel,
    seen_pictures,
)

PANELS = 38
"""Most heads in one figure; with the picture and the mean of the heads that is 40 panels."""


def head_heatmaps_info(
    pictures: Pictures,
    scores: ArrayLike,
    tiles: Tiles,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    kv_heads: int | None = None,
    caption: Caption | None = None,
) -> HeatInfo:
    """One overlay a query head of one layer, behind that of their mean.

    Args:
        pictures: what the model saw, one or several.
        scores: `[layers, heads, vision]` of one query row, such as `last_heads` of a run, or the
            mean over steps of `decode_heads`.
        tiles: where the vision tokens lie in each picture.
        layer: which layer; by default the one that looks at the pictures most.
        heads: which heads; by default at most 38, evenly spread, first and last included.
        kv_heads: KV heads of the model, to say how many query heads share one.
        caption: sample, prompt and query row of the scores.

    Raises:
        UserError: as `vision_heatmap_info`, a layer or head that does not exist, or KV heads that
            the heads cannot be shared out to.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 3:
        raise UserError(
            f"scores must be [layers, heads, vision], got {table.ndim} dimensions; trace with --per-head"
        )
    seen, own = seen_pictures(pictures, tiles, table.shape[2])
    depth, count = table.shape[:2]
    if layer is None:
        layer = int(table.sum(axis=2).mean(axis=1).argmax())
    if not 0 <= layer < depth:
        raise UserError(f"layer must be in 0 to {depth - 1}, got {layer}")
    if kv_heads is not None and (kv_heads < 1 or count % kv_heads):
        raise UserError(f"kv_heads must divide the {count} query heads, got {kv_heads}")
    if heads is None:
        heads = [round(i) for i in np.linspace(0, count - 1, min(count, PANELS))]
    wrong = next((head for head in heads if not 0 <= head < count), None)
    if wrong is not None or not len(heads):
        raise UserError(f"heads must name at least one head in 0 to {count - 1}, got {wrong}")
    mean = heat_panel("Mean", table[layer].mean(axis=0), own)
    panels = (mean, *(heat_panel(f"Head {head}", table[layer, head], own) for head in heads))
    note = counted(len(set(heads)), count, "head")
    if kv_heads is not None and kv_heads < count:
        note = f"{note}, each {count // kv_heads} in a row share a KV head"
    title = f"Where the heads of layer {layer} look"
    subtitle = (caption or Caption()).words()
    return heat_info(title, seen, panels, table.shape[2], note, beside="mass", subtitle=subtitle)


def head_heatmaps(
    pictures: Pictures,
    scores: ArrayLike,
    tiles: Tiles,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    kv_heads: int | None = None,
    caption: Caption | None = None,
) -> Figure:
    """The pictures under the attention of each head of a layer (see `head_heatmaps_info`).

    Every panel is scaled to its own brightest cell; above it stands how much of the head's
    attention goes to vision at all.
    """
    return draw_heatmaps(head_heatmaps_info(pictures, scores, tiles, layer, heads, kv_heads, caption))
