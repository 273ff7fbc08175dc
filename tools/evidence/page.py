"""The page: what the folders of all models say, with their figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from avlprof.errors import counted
from avlprof.files import write_text
from avlprof.plots.save import save_figure
from avlprof.tuning.rivals import RANDOM, UNIFORM
from tools.evidence.figures import budgets_figure, layers_figure
from tools.evidence.plan import Plan
from tools.evidence.results import Measured, read
from tools.evidence.sections import answers, in_short, knobs, looks, needs, saved, table
from tools.evidence.words import heading, listed, row, score_text

TEXTS = Path(__file__).parent
"""Where `head.md` and `tail.md` lie, the parts of the page that no number changes."""


def write_page(folders: Sequence[tuple[Plan, Path]], shares: Sequence[float], path: Path) -> Path:
    """Write the page and its figures from what the folders of the models hold."""
    known = [found for plan, folder in folders if (found := read(plan, folder, shares))]
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = [_text("head"), *_summary(known)]
    for measured in known:
        lines += _model(measured, images)
    commands, rows = "\n".join(map(_command, known)), "\n".join(map(_plan, known))
    lines.append(_text("tail").format(commands=commands, plans=rows))
    write_text(path, "\n".join(lines))
    return path


def _text(name: str) -> str:
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8")


def _command(measured: Measured) -> str:
    return f"{f'python -m tools.evidence --models {measured.plan.model}':<56} # one model"


def _plan(measured: Measured) -> str:
    p = measured.plan
    generated = p.generated if measured.proved else "-"
    sizes = (f"{p.traced}, {p.heads}", p.samples, p.held_out, generated, f"{p.trials}, {p.refine}")
    return row(f"`{p.model}`", f"`{p.task}`", *map(str, sizes))


def _summary(known: Iterable[Measured]) -> list[str]:
    """Who wins, in one table and a sentence a model."""
    rows = heading(
        "model", "vision KV", "tuned, KL", "saved against uniform", "against random", "against the strongest"
    )
    sentences = []
    for measured in known:
        for at in measured.compared:
            cells = [f"`{measured.plan.model}`", f"{at.share:.0%}", score_text(at.of("tuned"))]
            cells += [saved(at, name) for name in (UNIFORM, RANDOM)]
            rows.append(row(*cells, f"{saved(at, at.strongest)} `{at.strongest}`"))
        if measured.compared:
            sentences.append(f"- {in_short(measured)}")
    return ["## In short", "", *sentences, "", *rows, ""] if sentences else []


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
