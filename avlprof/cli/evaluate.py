"""`avlprof evaluate`: policies against the dense model on held-out samples."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._options import launch_options, model_options, task_options
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
from avlprof.errors import UserError, counted
from avlprof.files import check_output
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.evaluation import Evaluation
    from avlprof.launchers import Launch
    from avlprof.models import LoadedModel
    from avlprof.policy import Policy
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(add_completion=False)


@app.command("evaluate")
@model_options
@task_options
@launch_options
def evaluate_policies(
    spec: ModelSpec,
    source: TaskSpec,
    launch: Launch,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="Policy file or shipped name; repeat to compare. By default all shipped."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="How many samples; by default as the task says.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which split of the task.")] = "held-out",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples generated at a time.")] = 16,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Add uniform and random at equal bytes.")
    ] = True,
    fidelity: Annotated[
        bool, typer.Option("--fidelity/--no-fidelity", help="KL and agreement with the dense model.")
    ] = True,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Seconds and peak memory at batch 1.")
    ] = True,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Traced run for policies with an allocator; by default the newest of this model and task.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; by default evaluations/<model>-<task>-<split>."),
    ] = None,
    form: FormatOption = Format.table,
    figure_format: FigureFormatOption = FigureFormat.png,
) -> None:
    """Accuracy, fidelity, KV bytes and speed of policies beside the dense model.

    Answers are kept in the output folder, so the same command resumes.
    """
    from avlprof.evaluation import EvaluationSettings
    from avlprof.evaluation.evaluate import evaluate
    from avlprof.evaluation.shared import open_store
    from avlprof.locks import FolderLock
    from avlprof.models import load_model

    policies = _policies(policy)
    settings = EvaluationSettings(
        split=split,
        samples=samples,
        batch_size=batch_size,
        baselines=baselines,
        fidelity=fidelity,
        latency=latency,
    )
    task = source.load()
    task.samples(split, samples)
    folder = out or Path("evaluations") / re.sub(r"[^\w.-]+", "-", f"{spec.name}-{task.name}-{split}")
    check_output(folder, folder=True)
    with (
        FolderLock(folder / "parts"),
        open_store(folder / "parts", launch, spec, source) as store,
        bars() as watch,
    ):
        loaded = load_model(spec)
        resolver = Resolver(loaded, task, run)
        policies = [resolver(one) for one in policies] if policy else _fitting(policies, resolver, loaded)
        evaluation = evaluate(loaded, task, policies, settings, store=store, watch=watch)
    wrote = _write(evaluation, folder, figure_format)
    _print(evaluation, form)
    name = policy[0] if policy else policies[0].name
    finished(wrote, f"avlprof run --policy {name} --image x.png --prompt '...'")


def _policies(names: list[str] | None) -> list[Policy]:
    """The policies of these names; without names, the shipped ones that this runtime can run."""
    from avlprof.policy import find_policy, shipped
    from avlprof.runtime.support import unsupported

    if names:
        return named_policies(names)
    return [policy for policy in map(find_policy, shipped()) if unsupported(policy) is None]


def _fitting(policies: list[Policy], resolver: Resolver, loaded: LoadedModel) -> list[Policy]:
    """The shipped policies that fit the model, their shares worked out; a line for each of the others."""
    fitting = []
    for policy in policies:
        try:
            clear = resolver(policy)
            clear.check_layers(loaded.adapter.layers)
        except UserError as error:
            note(f"left out: {policy.name} ({error})")
            continue
        fitting.append(clear)
    return fitting


def _write(evaluation: Evaluation, folder: Path, suffix: str) -> list[Path]:
    from avlprof.plots.pareto import pareto_front
    from avlprof.plots.save import save_figure

    wrote = [
        evaluation.to_parquet(folder / "answers.parquet"),
        evaluation.to_csv(folder / "summary.csv"),
        evaluation.to_json(folder / "summary.json"),
    ]
    meta = evaluation.meta
    label = f"{str(meta['metric']).replace('_', ' ')} on {meta['task']} ({meta['split']})"
    return [*wrote, save_figure(pareto_front(evaluation.pareto(), score=label), folder / "pareto", suffix)]


def _print(evaluation: Evaluation, form: Format) -> None:
    summary = evaluation.summary()
    for line in evaluation.warnings():
        note(line)
    rows: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items()} for row in summary.to_dict("records")
    ]
    if form is not Format.table:
        show(rows, form)
        return
    meta = evaluation.meta
    about = f"{counted(meta['samples'], 'sample')} of {meta['split']}, {meta['metric']}"
    title = f"{meta['model']} on {meta['task']}, {about}"
    shares = dict.fromkeys(("agreement", "live_share", "read_share"), percent)
    show(_table(rows), form, title, {**shares, "live_bytes": size})
    drop = summary["detectable"].max()
    if not math.isnan(drop):
        note(f"in the least sure row a drop of {drop:.3f} would be seen 4 times out of 5")
    policies = set(summary["policy"])
    buffered = next((timed for timed in evaluation.latencies if timed.policy not in policies), None)
    if buffered is not None:
        note(
            f"{buffered.policy}: {buffered.first_token_ms:.1f} ms to the first token, "
            f"{buffered.tokens_per_s:.1f} tokens/s; the fair baseline of speed, as policies preallocate"
        )


_NUMBERS = (
    *("p_value", "kl", "agreement", "live_share", "read_share", "live_bytes"),
    *("first_token_ms", "tokens_per_s", "peak_mb", "output_tokens"),
)


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits a terminal: intervals beside their means, nothing that was not measured."""
    measured = [name for name in _NUMBERS if not all(math.isnan(row[name]) for row in rows)]
    return [
        {
            "policy": row["policy"],
            "score": f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            "vs dense": _difference(row),
            **{name: row[name] for name in measured},
        }
        for row in rows
    ]


def _difference(row: dict[str, Any]) -> str:
    if math.isnan(row["difference_low"]):
        return "-"
    return f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
