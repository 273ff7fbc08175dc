"""Vision attention laid over the picture, a panel a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from avlprof.errors import UserError
from avlprof.plots.frames import NO_VISION, Array
from avlprof.plots.style import SOFT, new_figure, theme

TITLE = 12.5
LONGEST = 14
PANELS = 12
"""Most layers that are shown unless others are asked for."""


@dataclass(frozen=True)
class HeatPanel:
    """One picture's overlay: `weight [rows, cols]` in [0, 1], relative to `peak`.

    `peak` is the panel's largest score as a share of the panel's vision attention.
    """

    title: str
    weight: Array
    peak: float


@dataclass(frozen=True)
class HeatInfo:
    """What a heatmap figure draws; `picture [height, width, 3]` in 0-255."""

    title: str
    picture: NDArray[np.uint8]
    panels: tuple[HeatPanel, ...]
    note: str = ""


def heat_panel(title: str, scores: ArrayLike, grid: tuple[int, int]) -> HeatPanel:
    """One panel of `scores [vision]`, which run row by row over `grid` (rows, columns).

    Raises:
        UserError: there is no score, or not one for every cell of the grid.
    """
    flat = np.asarray(scores, dtype=float)
    if not flat.size:
        raise UserError(f"a vision heatmap has nothing to draw: {NO_VISION}")
    rows, cols = grid
    if rows * cols != flat.size:
        raise UserError(
            f"a grid of {rows} x {cols} has {rows * cols} cells, but there are {flat.size} vision tokens; "
            "give the grid of this picture"
        )
    most, total = float(flat.max()), float(flat.sum())
    weight = flat / most if most > 0 else flat * 0.0
    return HeatPanel(title, weight.reshape(rows, cols), most / total if total > 0 else 0.0)


def vision_heatmap_info(
    image: Image.Image, scores: ArrayLike, grid: tuple[int, int], layers: Sequence[int] | None = None
) -> HeatInfo:
    """Overlays of some layers on a picture.

    Args:
        image: the picture that the model saw.
        scores: `[layers, vision]` attention that each vision token received, one query row.
        grid: rows and columns of vision tokens.
        layers: which layers; by default at most twelve, evenly spread, first and last included.

    Raises:
        UserError: no vision tokens, a grid of another size, or a layer that does not exist.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=float))
    shown = ""
    if layers is None:
        shown = f"{PANELS} of {len(table)} layers" if len(table) > PANELS else ""
        count = min(len(table), PANELS)
        layers = [round(i) for i in np.linspace(0, len(table) - 1, count)]
    if not len(layers):
        raise UserError("layers must name at least one layer, got none")
    for layer in layers:
        if not 0 <= layer < len(table):
            raise UserError(f"layers must be in 0 to {len(table) - 1}, got {layer}")
    panels = tuple(heat_panel(f"Layer {layer}", table[layer], grid) for layer in layers)
    title = "Where each layer looks" if len(panels) != 1 else f"Where layer {layers[0]} looks"
    return HeatInfo(title, np.asarray(image.convert("RGB")), panels, shown)


def vision_heatmap(
    image: Image.Image, scores: ArrayLike, grid: tuple[int, int], layers: Sequence[int] | None = None
) -> Figure:
    """The picture, and the picture under each layer's vision attention (see `vision_heatmap_info`).

    Every panel is scaled to its own largest score, which stands above it as a share of the
    panel's vision attention: 100% would be one token, 1 / tokens is even attention.
    """
    return draw_heatmaps(vision_heatmap_info(image, scores, grid, layers))


def draw_heatmaps(info: HeatInfo) -> Figure:
    """Small multiples of one picture: as it is, then under each panel's weights."""
    count = len(info.panels) + 1
    height, width = info.picture.shape[:2]
    cols = _columns(count)
    rows = math.ceil(count / cols)
    side = max(1.9, 12.0 / cols) if cols > 2 else 4.6
    size = (cols * side + 1.6, rows * (side * height / width + 0.28) + 1.25)
    with theme():
        even = f"even attention would be {1 / info.panels[0].weight.size:.2%}"
        note = "; ".join(
            t for t in (info.note, "right: the strongest token's share of vision attention", even) if t
        )
        figure = new_figure(info.title, note, size, square=True)
        flat = list(figure.subplots(rows, cols, squeeze=False).flat)
        for ax in flat:
            ax.set_axis_off()
        flat[0].imshow(info.picture)
        flat[0].set_title("Picture", fontsize=TITLE, pad=5)
        for panel, ax in zip(info.panels, flat[1:], strict=False):
            _overlay(panel, info.picture, ax)
        colours = ScalarMappable(norm=Normalize(0, 1), cmap=_heat())
        bar = figure.colorbar(colours, ax=flat, aspect=28, pad=0.015)
        bar.set_label("Attention, relative to panel's peak")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        bar.outline.set_visible(False)
        return figure


def _overlay(panel: HeatPanel, picture: NDArray[np.uint8], ax: Axes) -> None:
    height, width = picture.shape[:2]
    grey = picture.mean(axis=2) / 255.0
    ax.imshow(0.25 + 0.75 * grey, cmap="gray", vmin=0.0, vmax=1.0)
    opacity = 0.15 + 0.75 * np.sqrt(panel.weight)
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(
        panel.weight, cmap=_heat(), vmin=0.0, vmax=1.0, alpha=opacity, extent=place, interpolation="nearest"
    )
    ax.set_title(
        panel.title if len(panel.title) <= LONGEST else f"{panel.title[: LONGEST - 1]}…",
        fontsize=TITLE,
        pad=5,
    )
    peak = f"{panel.peak:.1%}" if panel.peak < 0.0995 else f"{panel.peak:.0%}"
    ax.set_title(peak, loc="right", fontsize=TITLE - 1, color=SOFT, pad=5)


def _heat() -> Colormap:
    return LinearSegmentedColormap.from_list("heat", ["#FFFFFF", "#FDD49E", "#FC8D59", "#D7301F", "#7F0000"])


def _columns(count: int) -> int:
    """Few panels in one row; more of them in a grid that is wider than tall and well filled."""
    if count <= 4:
        return count
    wide = min(8, math.ceil(math.sqrt(count * 1.7)))
    return math.ceil(count / math.ceil(count / wide))
