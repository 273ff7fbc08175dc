"""`avlprof compare`: every baseline and your policies at equal bytes, at several budgets."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._options import launch_options, model_options, parse_shares, task_options
from avlprof.cli._output import (
    FigureFormat,
    FigureFormatOption,
    Format,
    FormatOption,
    finished,
    note,
    percent,
    show,
    size,
)
from avlprof.cli._progress import bars
from avlprof.cli._resolved import Resolver, named_policies
from avlprof.errors import counted
from avlprof.files import check_output
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.evaluation import Comparison
    from avlprof.launchers import Launch
    from avlprof.policy import Policy
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(add_completion=False)


@app.command("compare")
@model_options
@task_options
@launch_options
def compare_policies(
    spec: ModelSpec,
    source: TaskSpec,
    launch: Launch,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Shares of the dense prompt KV, such as 0.1,0.2,0.4.")
    ] = "0.2,0.4",
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Policy file or shipped name to compare too; repeat."),
    ] = None,
    study: Annotated[
        list[Path] | None,
        typer.Option("--study", help="Folder of a study whose winner to compare at its budget; repeat."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            help="Only this baseline, or one of pooled, pooled-4, smaller-picture, smaller-picture-4; "
            "repeat. By default all.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="How many of each split; by default the task's.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which split is compared.")] = "held-out",
    select_split: Annotated[
        str,
        typer.Option("--select-split", help="Split that picks the strongest baseline; 'none' picks none."),
    ] = "search",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples generated at a time.")] = 16,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Traced run for policies with an allocator; by default the newest of this model and task.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; by default comparisons/<model>-<task>-<split>."),
    ] = None,
    submit: Annotated[
        Path | None,
        typer.Option("--submit", help="Folder for a file a budget to share; see 'avlprof leaderboard'."),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Who submits; nobody is named unless you say.")] = "",
    form: FormatOption = Format.table,
    figure_format: FigureFormatOption = FigureFormat.png,
) -> None:
    """Dense, all baselines and your policies on the same samples, at equal bytes.

    Every policy is scaled to every budget; what cannot go so low is listed. Answers are kept in
    the output folder, so the same command resumes.
    """
    from avlprof.evaluation import ComparisonSettings
    from avlprof.evaluation.compare import compare
    from avlprof.evaluation.lineup import SMALLER
    from avlprof.evaluation.shared import open_store
    from avlprof.locks import FolderLock
    from avlprof.models import load_model
    from avlprof.policy import find_policy

    smaller = {policy.name: policy for policy in SMALLER}
    budgets = parse_shares("--budget", budget)
    mine = named_policies(policy or [])
    tuned = _winners(study or [])
    baselines = [smaller.get(name) or find_policy(name) for name in baseline] if baseline else None
    task = source.load()
    task.samples(split, samples)
    label = f"{Path(spec.name).name}-{task.name}-{split}"
    folder = out or Path("comparisons") / re.sub(r"[^\w.-]+", "-", label)
    check_output(folder, folder=True)
    check_output(submit, folder=True)
    _check_name(by, submit)
    with (
        FolderLock(folder / "parts"),
        open_store(folder / "parts", launch, spec, source) as store,
        bars() as watch,
    ):
        loaded = load_model(spec)
        resolver = Resolver(loaded, task, run)
        settings = ComparisonSettings(
            split=split,
            select_split=None if select_split == "none" else select_split,
            samples=samples,
            batch_size=batch_size,
            baselines=baselines,
            evidence=lambda: resolver.evidence,
        )
        comparison = compare(
            loaded, task, budgets, given=mine, tuned=tuned, settings=settings, store=store, watch=watch
        )
    wrote = _write(comparison, folder, figure_format)
    if submit is not None:
        from avlprof.evaluation.submission import save_submissions, submissions

        wrote += save_submissions(submissions(comparison, loaded, task, by), submit)
    _print(comparison, form)
    finished(wrote, f"avlprof tune --model {spec.name} --task {source.name} --budget {budgets[0]:g}")


def _check_name(by: str, submit: Path | None) -> None:
    from avlprof.errors import UserError, shortened

    if by and submit is None:
        raise UserError("--by says who submits; give --submit FOLDER too")
    if len(by) > 100 or not by.isprintable():
        raise UserError(f"--by must be a name of at most 100 printable characters, got {shortened(by)}")


def _winners(folders: list[Path]) -> list[Policy]:
    """The winners of studies: one line for all budgets, unless two were tuned at the same one."""
    from avlprof.tuning import export_policy

    winners = [export_policy(folder) for folder in folders]
    budgets = [policy.provenance.budget if policy.provenance else None for policy in winners]
    alone = len(set(budgets)) == len(budgets)
    return [
        policy.model_copy(update={"name": "tuned" if alone else f"tuned ({folder.resolve().name})"})
        for folder, policy in zip(folders, winners, strict=True)
    ]


def _write(comparison: Comparison, folder: Path, suffix: str) -> list[Path]:
    from avlprof.plots.budgets import quality_by_budget
    from avlprof.plots.save import save_figure

    meta = comparison.meta
    label = f"{str(meta['metric']).replace('_', ' ')} on {meta['task']} ({meta['split']})"
    figure = quality_by_budget(comparison.summary(), score=label[0].upper() + label[1:])
    return [*comparison.save(folder), save_figure(figure, folder / "compare", suffix)]


def _print(comparison: Comparison, form: Format) -> None:
    summary, meta = comparison.summary(), comparison.meta
    for line in comparison.warnings():
        note(line)
    rows: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items()} for row in summary.to_dict("records")
    ]
    if form is not Format.table:
        show(rows, form)
    else:
        about = f"{counted(meta['samples'], 'sample')} of {meta['split']}, {meta['metric']}"
        title = f"{meta['model']} on {meta['task']}, {about}"
        shares = dict.fromkeys(("budget", "live_share", "read_share"), percent)
        others = ("dense", "uniform", "strongest") if comparison.strongest else ("dense", "uniform")
        cells = {**shares, "live_bytes": size, "output_tokens": "{:.1f}".format}
        show([_row(row, others) for row in rows], form, title, cells)
        note("differences are paired by sample, with 95% intervals, not corrected for the number of rows")
        if comparison.strongest:
            note(f"* the strongest baseline of its budget on split '{meta['select_split']}'")
    for line in _left_out(comparison):
        note(line)


def _left_out(comparison: Comparison) -> list[str]:
    """A line for each method and reason, with its budgets."""
    budgets: dict[tuple[str, str], list[str]] = {}
    for item in comparison.lineup.left_out:
        budgets.setdefault((item.method, item.reason), []).append(f"{item.budget:g}")
    return [f"left out at {', '.join(at)}: {method} ({why})" for (method, why), at in budgets.items()]


def _row(row: dict[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """What fits a terminal: intervals beside their means."""
    seeds = f" x{row['seeds']}" if row["seeds"] > 1 else ""
    return {
        "budget": row["budget"],
        "method": f"{row['method']}{seeds}{' *' if row['strongest'] else ''}",
        "score": f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        **{f"vs {other}": _difference(row, f"vs_{other}") for other in others},
        **{name: row[name] for name in ("live_share", "read_share", "live_bytes", "output_tokens")},
    }


def _difference(row: dict[str, Any], name: str) -> str:
    if math.isnan(row[name]):
        return "-"
    return f"{row[name]:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"
