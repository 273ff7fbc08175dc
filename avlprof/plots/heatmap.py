"""Where each layer looks: vision attention laid over the pictures, a panel a layer."""

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

PANELS = 12
"""Most layers that are drawn unless others are asked for."""


def vision_heatmap_info(
    pictures: Pictures,
    scores: ArrayLike,
    tiles: Tiles,
    layers: Sequence[int] | None = None,
    caption: Caption | None = None,
) -> HeatInfo:
    """Overlays of some layers on the pictures of a prompt.

    Args:
        pictures: what the model saw, one or several.
        scores: `[layers, vision]` attention that each vision token received, one query row.
        tiles: where the vision tokens lie in each picture.
        layers: which layers; by default at most twelve, evenly spread, first and last included.
        caption: sample, prompt and query row of the scores.

    Raises:
        UserError: as `seen_pictures`, or a layer that does not exist.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=float))
    seen, own = seen_pictures(pictures, tiles, table.shape[1])
    if layers is None:
        layers = [round(i) for i in np.linspace(0, len(table) - 1, min(len(table), PANELS))]
    if not len(layers):
        raise UserError("layers must name at least one layer, got none")
    for layer in layers:
        if not 0 <= layer < len(table):
            raise UserError(f"layers must be in 0 to {len(table) - 1}, got {layer}")
    panels = tuple(heat_panel(f"Layer {layer}", table[layer], own) for layer in layers)
    title = "Where each layer looks" if len(panels) != 1 else f"Where layer {layers[0]} looks"
    note = counted(len(set(layers)), len(table), "layer")
    return heat_info(title, seen, panels, table.shape[1], note, subtitle=(caption or Caption()).words())


def vision_heatmap(
    pictures: Pictures,
    scores: ArrayLike,
    tiles: Tiles,
    layers: Sequence[int] | None = None,
    caption: Caption | None = None,
) -> Figure:
    """The pictures, and the pictures under each layer's vision attention (see `vision_heatmap_info`).

    Every panel is scaled to its own brightest cell; above it stands the strongest token's share
    of the panel's vision attention: 100% would be one token, 1 / tokens is even attention.
    """
    return draw_heatmaps(vision_heatmap_info(pictures, scores, tiles, layers, caption))
