"""What `avlprof tune` shows when it is done: figures and tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlprof.cli._output import Format, note, percent, show, size
from avlprof.errors import counted

if TYPE_CHECKING:
    from avlprof.tuning import Sweep, Tuned


CELLS = {"KV live": percent, "KV read": percent, "live": size, "budget": percent}


def draw(tuned: Tuned, suffix: str = "png") -> list[Path]:
    """The figures of a study: score by trial, the winner's layers, its knobs, importances, and the proof."""
    from avlprof import plots
    from avlprof.tuning.objective import MEANING

    kind = tuned.policy.provenance.objective if tuned.policy.provenance else ""
    meaning, cheap = (MEANING[name] for name in (kind, "fidelity" if kind == "accuracy" else kind))
    figures = {
        "trials": plots.trial_history(
            tuned.history(), f"Mean {meaning}", second=tuned.second, third=tuned.third
        ),
        "layers": plots.policy_layers(tuned.policy, layers=tuned.policy.layers or 1),
        "proof": plots.pareto_front(tuned.proof.pareto(), score=_label(tuned)),
    }
    if len(tuned.knobs):
        figures["knobs"] = plots.knob_effects(tuned.knobs, cheap)
    if len(tuned.importances):
        figures["importances"] = plots.parameter_importances(tuned.importances, meaning)
    return _save(figures, tuned.folder / "figures", suffix)


def draw_sweep(swept: Sweep, suffix: str = "png") -> list[Path]:
    """The figures of a sweep: the front, and what the winners keep in each layer."""
    from avlprof import plots
    from avlprof.plots.front import budget_front

    for tuned in swept.studies:
        draw(tuned, suffix)
    winners = [
        one.policy.model_copy(update={"name": f"tuned at {one.policy.provenance.budget:g}"})
        for one in swept.studies
        if one.policy.provenance
    ]
    figures = {
        "front": budget_front(swept.front(), score=_label(swept.studies[0])),
        "layers": plots.policy_layers(winners, layers=winners[0].layers or 1),
    }
    return _save(figures, swept.folder / "figures", suffix)


def print_proof(tuned: Tuned, form: Format) -> None:
    """The closing table: who scored what at which bytes, on samples the search never saw."""
    summary = [{str(k): v for k, v in row.items()} for row in tuned.proof.summary().to_dict("records")]
    if form is not Format.table:
        show(summary, form)
        return
    show([_row(tuned, row) for row in summary], form, _title(tuned), CELLS)
    if said := _beyond(tuned, summary):
        note(said)
    for line in tuned.comparisons():
        note(line)
    sys.stdout.flush()


def print_sweep(swept: Sweep, form: Format) -> None:
    """All proofs in one table."""
    front = [{str(k): v for k, v in row.items()} for row in swept.front().to_dict("records")]
    if form is not Format.table:
        show(front, form)
        return
    first = swept.studies[0]
    rows = [{"budget": row["budget"], **_row(first, row)} for row in front]
    show(rows, form, _title(first), CELLS)
    for tuned in swept.studies:
        source = tuned.policy.provenance
        for line in tuned.comparisons():
            note(f"{source.budget if source else 0:g}: {line}")
    sys.stdout.flush()


def _beyond(tuned: Tuned, summary: list[dict[str, Any]]) -> str:
    """Why a policy tuned at most at a budget may be shown above it; empty where it is not."""
    source = tuned.policy.provenance
    budget = source.budget if source else None
    over = [row["live_share"] for row in summary if row["policy"] != "dense" and budget is not None]
    if budget is None or not over or round(max(over), 3) <= round(budget, 3):
        return ""
    return (
        f"the budget of {percent(budget)} is met on the prompts of the search; those of the proof are "
        f"others, so up to {percent(max(over))} is measured there"
    )


def _row(tuned: Tuned, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "policy": row["policy"],
        str(tuned.proof.meta["metric"]): f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        "KV live": row["live_share"],
        "KV read": row["read_share"],
        "live": row["live_bytes"],
    }


def _title(tuned: Tuned) -> str:
    meta = tuned.proof.meta
    return f"{meta['task']}, {counted(meta['samples'], str(meta['split']) + ' sample')}; 95% intervals"


def _label(tuned: Tuned) -> str:
    return f"{tuned.proof.meta['metric'].replace('_', ' ')} ({tuned.proof.meta['split']})"


def _save(figures: dict[str, Any], folder: Path, suffix: str) -> list[Path]:
    from avlprof import plots

    for name, figure in figures.items():
        plots.save_figure(figure, folder / name, suffix)
    return [folder]
