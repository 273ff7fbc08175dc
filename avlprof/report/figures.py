"""Figures of a page, as data URIs, so that it needs no other file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from avlprof import plots
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.plots.style import theme

SHARP = 150
"""Dots per inch of figures with pictures in them."""
PER_INCH = 84
"""CSS pixels an inch of a figure takes at most, so that its text is near the size of the page's."""


@dataclass(frozen=True)
class Embedded:
    """A figure within a page: a data URI, and the most CSS pixels that it should be wide."""

    uri: str
    width: int


def as_svg(figure: Figure) -> Embedded:
    """A figure of lines and shapes; text becomes outlines, so that it looks alike everywhere."""
    buffer = io.StringIO()
    with theme(), mpl.rc_context({"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _embedded(figure, "image/svg+xml", _shorter(buffer.getvalue()).encode())


def as_png(figure: Figure) -> Embedded:
    """A figure with pictures in it, in 256 colours: a third of the size, and hard to tell apart."""
    buffer, small = io.BytesIO(), io.BytesIO()
    with theme():
        figure.savefig(buffer, format="png", dpi=SHARP)
    with Image.open(buffer) as drawn:
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return _embedded(figure, "image/png", small.getvalue())


def _embedded(figure: Figure, kind: str, data: bytes) -> Embedded:
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return Embedded(uri, round(PER_INCH * float(figure.get_size_inches()[0])))


def _shorter(svg: str) -> str:
    """Coordinates cut to a hundredth of a point; factors below 1, as scales of fonts, stay exact."""
    return re.sub(r"(?<![\w.])([1-9]\d*\.\d\d)\d+", r"\1", svg)


@dataclass(frozen=True)
class Captioned:
    """A figure, what it shows (for those who cannot see it) and how to read it."""

    figure: Embedded
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """Figures that answer one question; `notes` name those that the run has no data for."""

    key: str
    title: str
    figures: tuple[Captioned, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FigurePlan:
    """A figure of a profile: what it is called, in a file's name and in words, and how to read it.

    One that is `per_head` cannot be drawn of a run of head means; the page says so where `noted`.
    """

    file: str
    name: str
    draw: Callable[[Profile], Figure]
    caption: str
    per_head: bool = False
    noted: bool = True


SECTIONS: tuple[tuple[str, str, tuple[FigurePlan, ...]], ...] = (
    (
        "looking",
        "Which layers look at the picture",
        (
            FigurePlan(
                "modality-mass",
                "what each layer attends to",
                plots.modality_mass,
                "Each bar is one layer and adds up to 100% of its attention, mean over heads and samples. "
                "Blue is the picture; its top edge carries the 95% interval. Layers with little blue are "
                "the first candidates for fewer vision tokens.",
            ),
            FigurePlan(
                "vision-horizon",
                "how deep vision is looked at",
                plots.vision_horizon,
                "Attention on vision by depth, on a log scale. A diamond on the dashed line marks the "
                "horizon: from that layer on the picture gets less than 1% of the attention. This says where "
                "it is no longer looked at; whether anything is lost without it, only an evaluation tells.",
            ),
            FigurePlan(
                "sinks",
                "attention on first tokens",
                plots.sink_mass,
                "Attention that rests on the first tokens whatever they say (attention sinks, arXiv "
                "2309.17453). Where a line is high, a policy that evicts these tokens disturbs the layer.",
            ),
            FigurePlan(
                "heads",
                "layers by heads",
                plots.head_maps,
                "One cell a head: a row is a layer, a column a query head. Heads of one layer often share "
                "nothing but a budget; dark cells on the left are those that look at the picture.",
                per_head=True,
            ),
        ),
    ),
    (
        "tokens",
        "How many vision tokens a layer needs",
        (
            FigurePlan(
                "coverage-curves",
                "coverage curves",
                plots.coverage_curves,
                "How much of a layer's vision attention its best vision tokens hold: read up from a share of "
                "the tokens (log scale). Curves far above the dashed line are sparse. “One decoding step” is "
                "what must be read, “all steps of an answer” what must be stored.",
            ),
            FigurePlan(
                "layer-overlap",
                "overlap of layers",
                plots.layer_overlap,
                "The share of one layer's most attended vision tokens that are another layer's too. Near "
                "the overlap of random sets, layers need sets of their own.",
            ),
            FigurePlan(
                "head-overlap",
                "overlap of heads",
                plots.head_overlap,
                "The share of one head's most attended vision tokens that another head of its layer attends "
                "to most too, and of each head's that its layer's mean has. Where heads share little, one "
                "set for all of them (heads: shared in a policy) serves each badly; heads: kv_head gives "
                "each KV head its own.",
                per_head=True,
                noted=False,
            ),
            FigurePlan(
                "step-drift",
                "drift over steps",
                plots.step_drift,
                "The share of the most attended vision tokens that were so some decoding steps earlier. "
                "Where the curve nears the dashed line, a core chosen that long ago is no better than "
                "chance: it must be refreshed before.",
            ),
        ),
    ),
    (
        "text",
        "How far back text is needed",
        (
            FigurePlan(
                "text-window",
                "text windows",
                plots.text_window,
                "The share of text attention within the newest tokens. Each dot is the smallest window that "
                "holds 95% of it, the first text tokens aside, which stay beside any window.",
            ),
        ),
    ),
)


def plans_for(profile: Profile) -> Iterator[FigurePlan]:
    """Every figure that may be drawn of a profile."""
    for _, _, plans in SECTIONS:
        yield from (plan for plan in plans if profile.meta.settings.per_head or not plan.per_head)


def sections(profile: Profile) -> Iterator[Section]:
    """Every figure that the profile has data for, by question."""
    fit = [plan.file for plan in plans_for(profile)]
    for key, title, plans in SECTIONS:
        figures, notes = [], []
        for plan in plans:
            if plan.file not in fit and not plan.noted:
                continue
            try:
                figure = as_svg(plan.draw(profile))
            except UserError as error:
                notes.append(f"No figure of {plan.name}: {error}.")
            else:
                figures.append(Captioned(figure, f"Figure: {plan.name}", plan.caption))
        yield Section(key, title, tuple(figures), tuple(notes))
