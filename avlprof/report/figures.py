"""The figures of a report, in the order in which they are read, with words on how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from avlprof import plots
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.report.embed import Embedded, as_svg


@dataclass(frozen=True)
class Shown:
    """A figure, what it shows (for those who cannot see it) and how to read it."""

    figure: Embedded
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """Figures that answer one question; `notes` name those that the run has no data for."""

    key: str
    title: str
    shown: tuple[Shown, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    name: str
    draw: Callable[[Profile], Figure]
    caption: str
    per_head: bool = False  # left out, without a note, of runs of head means


SECTIONS: tuple[tuple[str, str, tuple[_Plan, ...]], ...] = (
    (
        "looking",
        "Which layers look at the picture",
        (
            _Plan(
                "what each layer attends to",
                plots.modality_mass,
                "Each bar is one layer and adds up to 100% of its attention, mean over heads and samples. "
                "Blue is the picture; its top edge carries the 95% interval. Layers with little blue are "
                "the first candidates for fewer vision tokens.",
            ),
            _Plan(
                "how deep vision is looked at",
                plots.vision_horizon,
                "Attention on vision by depth, on a log scale. A diamond on the dashed line marks the "
                "horizon: from that layer on the picture gets less than 1% of the attention. This says where "
                "it is no longer looked at; whether anything is lost without it, only an evaluation tells.",
            ),
            _Plan(
                "attention on first tokens",
                plots.sink_mass,
                "Attention that rests on the first tokens whatever they say (attention sinks, arXiv "
                "2309.17453). Where a line is high, a policy that evicts these tokens disturbs the layer.",
            ),
            _Plan(
                "layers by heads",
                plots.head_maps,
                "One cell a head: a row is a layer, a column a query head. Heads of one layer often share "
                "nothing but a budget; bright cells on the left are those that look at the picture.",
            ),
        ),
    ),
    (
        "tokens",
        "How many vision tokens a layer needs",
        (
            _Plan(
                "coverage curves",
                plots.coverage_curves,
                "How much of a layer's vision attention its best vision tokens hold: read up from a share of "
                "the tokens (log scale). Curves far above the dashed line are sparse. “One decoding step” is "
                "what must be read, “all steps of an answer” what must be stored.",
            ),
            _Plan(
                "overlap of layers",
                plots.layer_overlap,
                "The share of one layer's most attended vision tokens that are another layer's too. Near "
                "the overlap of random sets, layers need sets of their own.",
            ),
            _Plan(
                "overlap of heads",
                plots.head_overlap,
                "The share of one head's most attended vision tokens that another head of its layer attends "
                "to most too, and of each head's that its layer's mean has. Where heads share little, one "
                "set for all of them (heads: shared in a policy) serves each badly; heads: kv_head gives "
                "each KV head its own.",
                per_head=True,
            ),
            _Plan(
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
            _Plan(
                "text windows",
                plots.text_window,
                "The share of text attention within the newest tokens. Each dot is the smallest window that "
                "holds 95% of it, the first text tokens aside, which stay beside any window.",
            ),
        ),
    ),
)


def sections(profile: Profile) -> Iterator[Section]:
    """Every figure that the profile has data for, by question."""
    for key, title, plans in SECTIONS:
        shown, notes = [], []
        for plan in plans:
            if plan.per_head and not profile.meta.settings.per_head:
                continue
            try:
                figure = as_svg(plan.draw(profile))
            except UserError as error:
                notes.append(f"No figure of {plan.name}: {error}.")
            else:
                shown.append(Shown(figure, f"Figure: {plan.name}", plan.caption))
        yield Section(key, title, tuple(shown), tuple(notes))
