"""Attention laid over pictures: panels, their captions, and how they are drawn.

What a panel is (a layer, a head, a word) is the matter of `heatmap`, `head_panels` and `words`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from avlprof.errors import UserError
from avlprof.models.tiles import Tile, paint, resolution
from avlprof.plots.frames import NO_VISION, Array, joined
from avlprof.plots.style import GRID, SOFT, new_figure, theme

Pictures = Image.Image | Sequence[Image.Image]
Tiles = Sequence[Sequence[Tile]]
Beside = Literal["peak", "mass"]

TITLE = 12.5
LONGEST = 14
GAP = 0.06
"""Room between pictures, in heights of one."""
PROMPT = 160
"""Characters of a prompt that stand above a figure."""


@dataclass(frozen=True)
class Caption:
    """What a figure of pictures is of: id of the sample, its prompt, the query rows that look."""

    sample: str = ""
    prompt: str = ""
    rows: str = ""

    def words(self, rows: str = "") -> str:
        """All that is known, in a line; `rows` if it does not say which rows itself."""
        prompt = " ".join(self.prompt.split())
        prompt = prompt if len(prompt) <= PROMPT else f"{prompt[: PROMPT - 1]}…"
        rows = self.rows or rows
        parts = (
            f"Sample {self.sample}" if self.sample else "",
            f"prompt: “{prompt}”" if prompt else "",
            f"attention of {rows}" if rows else "",
        )
        return joined(*parts, by="  ·  ")


@dataclass(frozen=True)
class HeatPanel:
    """The overlays of one panel: for each picture `[rows, columns]` in [0, 1], relative to the
    panel's brightest cell.

    `peak` is the largest score of a patch, `unplaced` the score of tokens that are no patch
    (newlines), both as shares of the panel's vision attention; `mass` is all of that, as a share
    of the row's attention.
    """

    title: str
    weights: tuple[Array, ...]
    peak: float
    unplaced: float = 0.0
    mass: float = 0.0


@dataclass(frozen=True)
class HeatInfo:
    """What a heatmap figure draws; each of `pictures` is `[height, width, 3]` in 0-255.

    `note` says how many panels there are of how many and what colours leave out, `subtitle` what the
    pictures are, `beside` what stands beside the title of a panel.
    """

    title: str
    pictures: tuple[NDArray[np.uint8], ...]
    panels: tuple[HeatPanel, ...]
    tokens: int
    note: str = ""
    beside: Beside = "peak"
    subtitle: str = ""


def heat_panel(title: str, scores: ArrayLike, tiles: Tiles) -> HeatPanel:
    """One panel of `scores [vision]`, which lie in the pictures as their tiles say.

    Where tiles overlap (a thumbnail and its details) their scores add up. A cell is as large as
    the picture's finest token.
    """
    flat = np.asarray(scores, dtype=float)
    painted = [paint(own, flat, *resolution(own)) for own in tiles]
    placed = np.unique(np.concatenate([tile.tokens().ravel() for own in tiles for tile in own]))
    most, total = max(float(cells.max()) for cells in painted), float(flat.sum())
    weights = tuple(cells / most if most > 0 else cells * 0.0 for cells in painted)
    if total <= 0:
        return HeatPanel(title, weights, 0.0)
    rest = float(np.delete(flat, placed).sum())
    return HeatPanel(title, weights, float(flat[placed].max()) / total, rest / total, total)


def seen_pictures(pictures: Pictures, tiles: Tiles, tokens: int) -> tuple[list[Image.Image], Tiles]:
    """The pictures that have tiles, and their tiles.

    Args:
        pictures: all that the model saw in one prompt, frames of videos included.
        tiles: of each of them, as a run's `tiles` column and `Adapter.vision_layout` have them.
        tokens: vision tokens of the prompt.

    Raises:
        UserError: no vision tokens, no tiles, not one list of them a picture, or tiles that reach
            beyond the vision tokens.
    """
    if not tokens:
        raise UserError(f"a vision heatmap has nothing to draw: {NO_VISION}")
    whole = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not any(tiles):
        raise UserError(
            "where these vision tokens lie in the pictures is not known; docs/models.md says when it is"
        )
    if len(whole) != len(tiles):
        raise UserError(f"tiles must have one list for each of the {len(whole)} pictures, got {len(tiles)}")
    last = max(int(tile.tokens().max()) for own in tiles for tile in own)
    if last >= tokens:
        raise UserError(
            f"tiles name vision token {last}, but there are {tokens} vision tokens; give this prompt's tiles"
        )
    kept = [(picture, own) for picture, own in zip(whole, tiles, strict=True) if own]
    return [picture for picture, _ in kept], [own for _, own in kept]


def counted(drawn: int, total: int, noun: str, which: str = "") -> str:
    """`all 6 layers`, `12 of 32 layers`, or with which ones: `first 23 of 30 words`."""
    if drawn < total:
        return joined(which, f"{drawn} of {total} {noun}s", by=" ")
    return f"all {total} {noun}s" if total > 1 else f"1 {noun}"


def heat_info(
    title: str,
    pictures: Sequence[Image.Image],
    panels: tuple[HeatPanel, ...],
    tokens: int,
    note: str,
    beside: Beside = "peak",
    subtitle: str = "",
) -> HeatInfo:
    """The panels with their pictures, and in the note what the colours leave out."""
    rest = [panel.unplaced for panel in panels]
    if max(rest) >= 0.0005:
        ends = f"{max(rest):.1%}" if len(rest) == 1 else f"{min(rest):.1%} to {max(rest):.1%} of a panel"
        note = joined(note, f"newline tokens, not drawn, hold {ends}", by="; ")
    colours = tuple(np.asarray(picture.convert("RGB")) for picture in pictures)
    return HeatInfo(title, colours, panels, tokens, note, beside, subtitle)


def draw_heatmaps(info: HeatInfo) -> Figure:
    """Small multiples of the pictures: as they are, then under each panel's weights."""
    count = len(info.panels) + 1
    placed = arrange([(picture.shape[1], picture.shape[0]) for picture in info.pictures])
    cols = panel_columns(count, placed.width / placed.height)
    rows = math.ceil(count / cols)
    side = 11.8 / cols if cols > 2 else 4.6
    size = (cols * side + 1.6, rows * (side * placed.height / placed.width + 0.28) + 1.25)
    with theme():
        beside = "right: share of the attention that goes to vision"
        if info.beside == "peak":
            even = f"even attention would be {1 / info.tokens:.2%}"
            beside = f"right: the strongest token's share of vision attention; {even}"
        note = joined(info.note, beside, by="; ")
        figure = new_figure(info.title, note, size, square=True, subtitle=info.subtitle)
        flat = list(figure.subplots(rows, cols, squeeze=False).flat)
        for ax in flat:
            ax.set_axis_off()
        for picture, extent in zip(info.pictures, placed.extents, strict=True):
            flat[0].imshow(picture, extent=extent)
        flat[0].set_title("Picture" if len(info.pictures) == 1 else "Pictures", fontsize=TITLE, pad=5)
        for panel, ax in zip(info.panels, flat[1:], strict=False):
            share = panel.peak if info.beside == "peak" else panel.mass
            longest = min(LONGEST, int((72 * side - 40) / (0.6 * TITLE)))  # beside the share
            _overlay(replace(panel, title=_cut(panel.title, longest)), share, info.pictures, placed, ax)
        for ax in flat[:count]:
            frame_pictures(placed, ax)
        colours = ScalarMappable(norm=Normalize(0, 1), cmap=_heat())
        bar = figure.colorbar(colours, ax=flat, aspect=28, pad=0.015)
        bar.set_label("Attention, relative to panel's peak")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        bar.outline.set_visible(False)
        return figure


def _overlay(
    panel: HeatPanel, share: float, pictures: Sequence[NDArray[np.uint8]], placed: Arrangement, ax: Axes
) -> None:
    for weight, picture, extent in zip(panel.weights, pictures, placed.extents, strict=True):
        grey = picture.mean(axis=2) / 255.0
        ax.imshow(0.25 + 0.75 * grey, cmap="gray", vmin=0.0, vmax=1.0, extent=extent)
        opacity = 0.15 + 0.75 * np.sqrt(weight)
        ax.imshow(
            weight, cmap=_heat(), vmin=0.0, vmax=1.0, alpha=opacity, extent=extent, interpolation="nearest"
        )
    ax.set_title(panel.title, fontsize=TITLE, pad=5)
    beside = f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"
    ax.set_title(beside, loc="right", fontsize=TITLE - 1, color=SOFT, pad=5)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def frame_pictures(placed: Arrangement, ax: Axes) -> None:
    """A line around each picture, which on white paper may have no other edge."""
    for left, right, bottom, top in placed.extents:
        ax.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=GRID, clip_on=False)
        )
    ax.set_xlim(0, placed.width)
    ax.set_ylim(placed.height, 0)


def _heat() -> Colormap:
    return LinearSegmentedColormap.from_list("heat", ["#FFFFFF", "#FDD49E", "#FC8D59", "#D7301F", "#7F0000"])


@dataclass(frozen=True)
class Arrangement:
    """Where pictures stand on a panel of `width` x `height`, in heights of one picture.

    `extents` are left, right, bottom, top of each, with y running down, as `imshow` takes them.
    """

    width: float
    height: float
    extents: tuple[tuple[float, float, float, float], ...]


def arrange(sizes: Sequence[tuple[int, int]]) -> Arrangement:
    """Pictures of (width, height) in reading order, all drawn equally high, about as wide as tall."""
    widths = [width / height for width, height in sizes]
    across = math.sqrt(sum(widths)) if len(sizes) > 2 else sum(widths)
    extents, x, y, widest = [], 0.0, 0.0, 0.0
    for width in widths:
        if x and x + width > across + 0.5:
            x, y = 0.0, y + 1 + GAP
        extents.append((x, x + width, y + 1, y))
        widest = max(widest, x + width)
        x += width + GAP
    return Arrangement(widest, y + 1, tuple(extents))


def panel_columns(count: int, shape: float) -> int:
    """Few panels in one row; more of them in a grid that is wider than tall and well filled.

    `shape` is a panel's width over its height.
    """
    if count <= 4 and shape <= 1.5:
        return count
    wide = min(8, max(2, math.ceil(math.sqrt(count * 1.7 / max(shape, 0.6)))))
    return math.ceil(count / math.ceil(count / wide))
