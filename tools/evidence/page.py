"""The page: what the folders of all models say, with their figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from avlprof.errors import counted
from avlprof.files import write_text
from avlprof.plots.save import save_figure
from avlprof.tuning.rivals import RANDOM, UNIFORM
from tools.evidence.figures import budgets_figure, layers_figure
from tools.evidence.plan import PLANS, Plan
from tools.evidence.results import Measured, read
from tools.evidence.sections import answers, in_short, knobs, looks, needs, saved, table
from tools.evidence.words import heading, listed, row, score_text

TEXTS = Path(__file__).parent
"""Where `head.md` and `tail.md` lie, the parts of the page that no number changes."""

_SHORT, _MADE, _COMMAND = "## In short", "## How it was made", "python -m tools.evidence --models"
_MODEL_HEAD = re.compile(r"## The model `(.+)`")


@dataclass(frozen=True)
class Part:
    """All lines of the page that are about one model."""

    name: str
    short: list[str]  # sentence and rows of the summary
    section: list[str]
    command: list[str]
    plan: list[str]  # row of the table of sizes


def write_page(folders: Sequence[tuple[Plan, Path]], shares: Sequence[float], path: Path) -> Path:
    """Write the page and its figures from what the folders of the models hold.

    What an existing page says of other models stays as it is.
    """
    known = [found for plan, folder in folders if (found := read(plan, folder, shares))]
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = former_parts(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts |= {measured.plan.model: _part(measured, images) for measured in known}
    order = [*(name for name in PLANS if name in parts), *(name for name in parts if name not in PLANS)]
    write_text(path, assembled([parts[name] for name in order]))
    return path


def former_parts(page: str) -> dict[str, Part]:
    """What a page says of each model, by its name; `assembled` makes the same page of it."""
    lines = page.split("\n")
    heads = [at for at, line in enumerate(lines) if line.startswith("## ")]
    sections = [lines[at:end] for at, end in pairwise([*heads, len(lines)])]
    models = {found[1]: block for block in sections if (found := _MODEL_HEAD.fullmatch(block[0]))}
    rest = [line for block in sections if block[0] in (_SHORT, _MADE) for line in block]
    short = next((block for block in sections if block[0] == _SHORT), [])

    def of(name: str, *starts: str) -> list[str]:
        return [line for line in rest if line.startswith(tuple(f"{start} `{name}` " for start in starts))]

    return {
        name: Part(
            name,
            [line for line in of(name, "- On", "|") if line in short],
            block,
            [line for line in rest if line.startswith(f"{_COMMAND} {name} ")],
            [line for line in of(name, "|") if line not in short],
        )
        for name, block in models.items()
    }


def assembled(parts: Sequence[Part]) -> str:
    """The text of the page."""
    lines = [_text("head"), *_summary(parts)]
    for part in parts:
        lines += part.section
    commands = "\n".join(line for part in parts for line in part.command)
    plans = "\n".join(line for part in parts for line in part.plan)
    return "\n".join([*lines, _text("tail").format(commands=commands, plans=plans)])


def _text(name: str) -> str:
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8")


def _part(measured: Measured, images: Path) -> Part:
    """The lines of a model from its results; its figures are written to `images`."""
    p = measured.plan
    generated = p.generated if measured.proved else "-"
    sizes = (f"{p.traced}, {p.heads}", p.samples, p.held_out, generated, f"{p.trials}, {p.refine}")
    return Part(
        name=p.model,
        short=_short(measured),
        section=_model(measured, images),
        command=[f"{f'{_COMMAND} {p.model}':<56} # one model"],
        plan=[row(f"`{p.model}`", f"`{p.task}`", *map(str, sizes))],
    )


def _short(measured: Measured) -> list[str]:
    """Who wins on a model: a sentence, and a row a budget."""
    rows = []
    for at in measured.compared:
        cells = [f"`{measured.plan.model}`", f"{at.share:.0%}", score_text(at.of("tuned"))]
        cells += [saved(at, name) for name in (UNIFORM, RANDOM)]
        rows.append(row(*cells, f"{saved(at, at.strongest)} `{at.strongest}`"))
    return [f"- {in_short(measured)}", *rows] if rows else []


def _summary(parts: Sequence[Part]) -> list[str]:
    """The sentences of all models, and one table."""
    lines = [line for part in parts for line in part.short]
    rows = heading(
        "model", "vision KV", "tuned, KL", "saved against uniform", "against random", "against the strongest"
    )
    sentences, more = ([line for line in lines if line.startswith("-") == said] for said in (True, False))
    return [_SHORT, "", *sentences, "", *rows, *more, ""] if lines else []


def _model(measured: Measured, images: Path) -> list[str]:
    """The section of a model."""
    plan, name = measured.plan, f"`{measured.plan.model}`"
    sizes = (
        f"{measured.layers} layers, {measured.vision} vision tokens a prompt; task `{plan.task}`. "
        f"{counted(plan.traced, 'sample')} traced, {plan.samples} searched on, {plan.held_out} held out."
    )
    lines = [f"## The model {name}", "", f"{sizes} {plan.few}".rstrip(), "", *_unfinished(measured)]
    lines += [f"### What the layers and heads of {name} look at", "", *looks(measured)]
    lines += [f"### What the layers of {name} need", "", *needs(measured)]
    figure = save_figure(layers_figure(measured), images / f"evidence-{plan.model}-layers.png")
    lines += [f"![Attention, need and kept vision KV by layer](images/{figure.name})", ""]
    if measured.compared:
        lines += [f"### What the knobs are worth on {name}", "", *knobs(measured)]
        lines += [f"### Who wins at equal bytes on {name}", "", *table(measured)]
        figure = save_figure(budgets_figure(measured), images / f"evidence-{plan.model}-budgets.png")
        lines += [f"![KL to dense and agreement by budget](images/{figure.name})", ""]
    if measured.proved:
        lines += [f"### Generated answers of {name}", "", *answers(measured)]
    return lines


def _unfinished(measured: Measured) -> list[str]:
    """What is not measured yet."""
    waiting = {
        "not searched": list(measured.missing),
        "not compared": [at.share for at in measured.budgets if at.table is None],
        "not proved on generated answers": [at.share for at in measured.budgets if at not in measured.proved],
    }
    parts = [f"{what} at {listed(f'{s:.0%}' for s in shares)}" for what, shares in waiting.items() if shares]
    parts += ["what each layer needs is not measured"] if measured.damage is None else []
    return [f"**Not finished:** {'; '.join(parts)}. The same command goes on.", ""] if parts else []
