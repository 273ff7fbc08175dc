"""What vision tokens say behind each layer: words laid over the pictures, and how often they are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from avlprof.analysis.lens import Lens
from avlprof.errors import UserError
from avlprof.models.tiles import owners, resolution
from avlprof.plots.frames import Array
from avlprof.plots.pictures import (
    TITLE,
    Arrangement,
    Caption,
    Pictures,
    arrange,
    counted,
    frame_pictures,
    panel_columns,
    seen_pictures,
)
from avlprof.plots.style import (
    INK,
    OKABE_ITO,
    SOFT,
    interval_band,
    layer_axis,
    new_figure,
    percent_axis,
    plain_line,
    theme,
)

PANELS = 5
"""Most layers that are drawn unless others are asked for; with the picture itself that is two rows."""
NAMED = 10
"""Words that have a colour of their own; the rest is grey."""
REST, OWN, OTHER = "#D9D9D9", OKABE_ITO[0], OKABE_ITO[1]
INKS: Mapping[str, str] = {
    "red": "#D62222", "orange": "#F58C14", "yellow": "#E6C800", "green": "#1E9632", "blue": "#2646DC",
    "purple": "#8628A0", "pink": "#FA78BE", "brown": "#7D4B23", "gray": "#848484", "grey": "#848484",
    "black": "#141414",
}  # fmt: skip
"""Words that are colours are drawn in them."""
FREE = (*OKABE_ITO[:6], "#6A3D9A", "#8C6D31", "#17BECF", "#B15928")
LARGE, SMALL, LONGEST = 9.0, 7.8, 7
"""Points of a word within a patch, at most and at least, and its characters at most."""
WIDE = 0.66
"""Width of a letter, in its size."""


@dataclass(frozen=True)
class WordPanel:
    """What one layer says: for each picture `[rows, columns]`, the word of each cell (an index, -1 where no
    token is) and its probability."""

    title: str
    words: tuple[NDArray[np.int64], ...]
    shares: tuple[Array, ...]


@dataclass(frozen=True)
class LensWordsInfo:
    """What a figure of words over pictures draws; each of `pictures` is `[height, width, 3]` in 0-255.

    `words` are all likeliest words, the commonest first, and `counts` in how many cells each is.
    """

    title: str
    subtitle: str
    note: str
    pictures: tuple[NDArray[np.uint8], ...]
    panels: tuple[WordPanel, ...]
    words: tuple[str, ...]
    counts: tuple[int, ...]


def lens_words_info(
    lens: Lens, pictures: Pictures, sample: str | None = None, layers: Sequence[int] | None = None
) -> LensWordsInfo:
    """The likeliest word of each patch, behind some layers.

    Where tiles overlap (a thumbnail and its details) the finest token of a place is shown.

    Args:
        pictures: what the model saw, one or several.
        sample: id of a sample of the lens, by default its first.
        layers: which layers; by default at most five, evenly spread, first and last included.

    Raises:
        UserError: the sample or a layer was not read, or where its tokens lie is not known.
    """
    one = lens.sample(sample)
    seen, tiles = seen_pictures(pictures, one.pictures(), one.ids.shape[1])
    if layers is None:
        spread = np.linspace(0, len(lens.layers) - 1, min(len(lens.layers), PANELS))
        layers = [lens.layers[round(i)] for i in spread]
    for layer in layers:
        if layer not in lens.layers:
            raise UserError(f"layer {layer} was not read; these were: {', '.join(map(str, lens.layers))}")
    if not len(layers):
        raise UserError("layers must name at least one layer, got none")
    places = [owners(own, *resolution(own)) for own in tiles]
    rows = [lens.layers.index(layer) for layer in layers]
    said = [[shown_word(lens.word(i)) for i in one.ids[row, :, 0].tolist()] for row in rows]
    drawn = Counter(words[token] for words in said for place in places for token in place[place >= 0])
    order = {word: index for index, (word, _) in enumerate(drawn.most_common())}
    panels = []
    for layer, row, words in zip(layers, rows, said, strict=True):
        numbers = np.array([order.get(word, -1) for word in words] + [-1])
        shares = np.append(one.shares[row, :, 0].astype(float), 0.0)
        panels.append(
            WordPanel(
                f"Layer {layer}", tuple(numbers[at] for at in places), tuple(shares[at] for at in places)
            )
        )
    title = "What patches say" if len(panels) > 1 else f"What patches say behind layer {layers[0]}"
    caption = Caption(one.id, one.prompt).words()
    which = counted(len(panels), len(lens.layers), "layer")
    note = f"{which}; the likeliest word through the final norm and head, as strong as its probability"
    colours = tuple(np.asarray(picture.convert("RGB")) for picture in seen)
    return LensWordsInfo(
        title, caption, note, colours, tuple(panels), tuple(order), tuple(drawn[word] for word in order)
    )


def lens_words(
    lens: Lens, pictures: Pictures, sample: str | None = None, layers: Sequence[int] | None = None
) -> Figure:
    """The pictures under the words of their patches (see `lens_words_info`).

    Of several layers the commonest words have a colour each; of a single layer the words are written down.
    """
    return draw_words(lens_words_info(lens, pictures, sample, layers))


def draw_words(info: LensWordsInfo) -> Figure:
    """Small multiples of the pictures: as they are, then under each panel's words."""
    alone = len(info.panels) == 1
    placed = arrange([(picture.shape[1], picture.shape[0]) for picture in info.pictures])
    shape = placed.width / placed.height
    count = len(info.panels) + 1
    cols = 1 if alone else panel_columns(count, shape)
    rows = 1 if alone else -(-count // cols)
    side = 9.0 if alone else max(3.0, 11.4 / cols)
    size = (max(cols * side, 7.0), rows * (side / shape + 0.32) + 1.6)
    colours = word_colours(info.words[:NAMED])
    with theme():
        # the note stands above, since the legend takes its place below
        figure = new_figure(info.title, "", size, square=True, subtitle=f"{info.subtitle}\n{info.note}")
        axes = list(figure.subplots(rows, cols, squeeze=False).flat)
        for ax in axes:
            ax.set_axis_off()
        if not alone:
            for picture, extent in zip(info.pictures, placed.extents, strict=True):
                axes[0].imshow(picture, extent=extent)
            axes[0].set_title("Picture" if len(info.pictures) == 1 else "Pictures", fontsize=TITLE, pad=5)
        for panel, ax in zip(info.panels, axes if alone else axes[1:], strict=False):
            _paint(info, panel, placed, ax, colours)
            if alone:
                _write(info, panel, placed, ax, colours, 0.97 * size[0] / placed.width)
            else:
                ax.set_title(panel.title, fontsize=TITLE, pad=5)
        for ax in axes[: len(info.panels) + (not alone)]:
            frame_pictures(placed, ax)
        total = sum(info.counts)
        names = [
            f"{word} {count / total:.0%}"
            for word, count in zip(info.words[:NAMED], info.counts, strict=False)
        ]
        handles = [Patch(color=colours[word]) for word in info.words[:NAMED]]
        if len(info.words) > NAMED:
            handles.append(Patch(color=REST))
            names.append(f"{len(info.words) - NAMED} other words {sum(info.counts[NAMED:]) / total:.0%}")
        figure.legend(
            handles,
            names,
            loc="outside lower left",
            ncols=6 if size[0] > 10 else 5,
            handlelength=1.0,
            columnspacing=1.4,
        )
        return figure


def _paint(
    info: LensWordsInfo, panel: WordPanel, placed: Arrangement, ax: Axes, colours: Mapping[str, str]
) -> None:
    table = np.array([to_rgb(colours.get(word, REST)) for word in info.words] + [(1.0, 1.0, 1.0)])
    for picture, extent, words, shares in zip(
        info.pictures, placed.extents, panel.words, panel.shares, strict=True
    ):
        grey = picture.mean(axis=2) / 255.0
        ax.imshow(0.45 + 0.55 * grey, cmap="gray", vmin=0.0, vmax=1.0, extent=extent)
        opacity = np.where(words >= 0, 0.2 + 0.65 * np.sqrt(shares), 0.0)
        ax.imshow(np.dstack([table[words], opacity]), extent=extent, interpolation="nearest")


def _write(
    info: LensWordsInfo,
    panel: WordPanel,
    placed: Arrangement,
    ax: Axes,
    colours: Mapping[str, str],
    inches: float,
) -> None:
    """Each cell's word within it, where cells are large enough for letters that can be read.

    Args:
        inches: of a unit of the axes.
    """
    for (left, right, bottom, top), words in zip(placed.extents, panel.words, strict=True):
        rows, columns = words.shape
        wide, high = (right - left) / columns, (bottom - top) / rows
        room = 72 * wide * inches - 3
        if room < 3 * WIDE * SMALL or 72 * high * inches < SMALL:
            continue
        for (row, column), word in np.ndenumerate(words):
            if word >= 0:
                most = min(int(room / (WIDE * SMALL)), LONGEST)
                text = info.words[word]
                text = text if len(text) <= most else f"{text[: most - 1]}…"
                ax.text(
                    left + (column + 0.5) * wide,
                    top + (row + 0.5) * high,
                    text,
                    ha="center",
                    va="center",
                    fontsize=min(LARGE, max(SMALL, room / (WIDE * len(text)))),
                    color=_readable(colours.get(info.words[word], REST)),
                )


def _readable(colour: str) -> str:
    """Ink that is read on a colour: white on dark ones."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.38 else INK


def word_colours(words: Sequence[str]) -> dict[str, str]:
    """A colour for each word: its own where it names one, else one that is far from those."""
    own = {word: INKS[word.lower()] for word in words if word.lower() in INKS}
    taken = [np.array(to_rgb(ink)) for ink in own.values()]
    far = [ink for ink in FREE if all(np.abs(np.array(to_rgb(ink)) - one).sum() > 0.45 for one in taken)]
    free = iter([*far, *(ink for ink in FREE if ink not in far)])
    return {word: own.get(word) or next(free, REST) for word in words}


def shown_word(text: str) -> str:
    """A token's text as a figure writes it: without blanks around it, and marks for blanks alone."""
    return text.strip() or ("↵" if "\n" in text else "␣")


@dataclass(frozen=True)
class LensLayersInfo:
    """What the figure of a lens by layer draws: `layers`, and of each measure what is held to what.

    `lines` are by panel and name: mean, low and high, `[layers]` each.
    """

    layers: tuple[int, ...]
    panels: tuple[str, ...]
    lines: Mapping[tuple[str, str], tuple[Array, Array, Array]]
    note: str


_PANELS = {
    "thing": ("Names what it shows", "what it shows", "what stands elsewhere"),
    "answer": ("Says a word of the answer", "the sample's answer", "other samples' answers"),
    "plain": ("How sure, how settled", "", ""),
}


def lens_layers_info(frame: pd.DataFrame, samples: int) -> LensLayersInfo:
    """What rows of `Lens.by_layer` say, panel by panel.

    Args:
        frame: `layer, measure, what, mean, low, high, n`.
        samples: how many were read, for the note.
    """
    layers = tuple(sorted(int(layer) for layer in frame["layer"].unique()))
    lines: dict[tuple[str, str], tuple[Array, Array, Array]] = {}
    panels = []
    for measure in ("thing", "answer"):
        own = frame[frame["measure"] == measure]
        if own.empty:
            continue
        title, mine, others = _PANELS[measure]
        panels.append(title)
        for what, name in (("own", mine), ("other", others)):
            lines[title, name] = _line(own[own["what"] == what], layers)
    title = _PANELS["plain"][0]
    panels.append(title)
    for measure, name in (
        ("share", "probability of the likeliest word"),
        ("settled", "same word as at the end"),
    ):
        lines[title, name] = _line(frame[frame["measure"] == measure], layers)
    note = f"mean and 95% interval over {samples} samples" if samples > 1 else "1 sample"
    return LensLayersInfo(layers, tuple(panels), lines, note)


def _line(rows: pd.DataFrame, layers: tuple[int, ...]) -> tuple[Array, Array, Array]:
    table = rows.set_index("layer").reindex(list(layers))
    mean, low, high = (table[name].to_numpy(dtype=float) for name in ("mean", "low", "high"))
    return mean, low, high


def lens_layers(frame: pd.DataFrame, samples: int) -> Figure:
    """By layer: how often the likeliest word is right, and by chance (see `lens_layers_info`)."""
    info = lens_layers_info(frame, samples)
    with theme():
        size = (4.2 * len(info.panels) + 0.2, 4.9)
        note = f"share of patches behind each layer; {info.note}"
        figure = new_figure("What vision tokens say, layer by layer", note, size)
        axes = list(figure.subplots(1, len(info.panels), squeeze=False).flat)
        for ax, title in zip(axes, info.panels, strict=True):
            own = {name: line for (panel, name), line in info.lines.items() if panel == title}
            for (name, (mean, low, high)), colour in zip(own.items(), (OWN, OTHER), strict=True):
                interval_band(ax, info.layers, low, high, colour)
                plain_line(ax, info.layers, mean, colour, label=name, marker="o" if len(mean) < 12 else "")
            ax.set_title(title)
            layer_axis(ax, info.layers)
            percent_axis(ax, "y", full=False)
            most = max(np.nanmax(np.fmax(mean, high)) for mean, _, high in own.values())
            top = max(float(most) * 1.32, 0.01)
            ax.set_ylim(0.0, top)
            ax.set_yticks([tick for tick in MaxNLocator(6).tick_values(0.0, top) if tick <= min(top, 1.0)])
            ax.legend(*ax.get_legend_handles_labels(), loc="upper left", labelcolor=SOFT, borderaxespad=0.2)
        return figure
