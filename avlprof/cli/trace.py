"""`avlprof trace`: let a model answer and record where it looks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._options import (
    ImageOption,
    PromptOption,
    launch_options,
    model_options,
    refuse_beside_picture,
    task_options,
)
from avlprof.cli._output import (
    Format,
    FormatOption,
    finished,
    note,
    percent,
    show,
    size,
)
from avlprof.cli._progress import bars
from avlprof.errors import UserError, counted
from avlprof.files import check_output
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.api.trace import TracePlan
    from avlprof.launchers import Launch
    from avlprof.run import Run
    from avlprof.runs import Shard
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(add_completion=False)


@app.command()
@model_options
@task_options
@launch_options
def trace(
    context: typer.Context,
    spec: ModelSpec,
    source: TaskSpec,
    launch: Launch,
    samples: Annotated[int, typer.Option("--samples", "-n", help="How many samples.")] = 64,
    split: Annotated[str, typer.Option("--split", help="Which split of the task.")] = "search",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; by default runs/<model>-<task>.")
    ] = None,
    image: ImageOption = None,
    prompt: PromptOption = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Samples that run together; changes no number.")
    ] = 1,
    forced: Annotated[
        bool, typer.Option("--forced", help="Trace over the reference answers, not the model's own.")
    ] = False,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Trace under a policy: a YAML file or a name.")
    ] = None,
    rows: Annotated[
        str, typer.Option("--rows", help="Rows of a prompt to record: default, or all (slower).")
    ] = "default",
    vision_rows: Annotated[int, typer.Option("--vision-rows", help="Vision rows recorded by default.")] = 64,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Store every query head, not their mean.")
    ] = False,
    history: Annotated[
        float | None,
        typer.Option("--history", help="Record history scores of text for this kept share of it."),
    ] = None,
    text_rows: Annotated[
        bool, typer.Option("--text-rows", help="Store each word of the question, for avlprof explore.")
    ] = False,
    form: FormatOption = Format.table,
) -> None:
    """Let a model answer samples and record the attention of every layer and head.

    Samples that the run directory holds already are skipped, so the same command resumes. As
    one of several processes of torchrun or SLURM it traces its share into the same directory.
    """
    from avlprof.api.trace import QUEUE, plan_trace
    from avlprof.launchers.queue import Queue
    from avlprof.run import picture_task
    from avlprof.tracing.options import RecordOptions, TraceSettings

    own = bool(image) or prompt is not None
    if own:
        refuse_beside_picture(context)
    check_output(out, folder=True)
    settings = TraceSettings(
        split=None if own else split,
        max_new_tokens=source.max_new_tokens,
        batch_size=batch_size,
        forced=forced,
        policy=policy,
        record=RecordOptions(
            rows=rows, vision_rows=vision_rows, per_head=per_head, history=history, text_rows=text_rows
        ),
    )
    plan = plan_trace(
        spec,
        picture_task(image or [], prompt) if own else source.load(),
        None if own else samples,
        settings,
        out=out,
        shard=_shard(launch),
    )
    if plan.shard.member:
        plan.serve(Queue(Path(os.environ[QUEUE])))
        return
    if plan.shard.index > 0:
        _trace_beside(plan)
        return
    lacking = "" if own else plan.task.describe(split, samples)
    if lacking:
        note(lacking)
    price = " (every row of each prompt, which is slower)" if rows == "all" else ""
    processes = max(plan.shard.count, launch.workers)
    among = f" by {processes} processes" if processes > 1 else ""
    most = size(plan.estimated_bytes)
    note(f"{counted(len(plan.samples), 'sample')}{among} to {plan.out}, at most about {most} on disk{price}")
    with bars(resumes=True) as watch:
        run = plan.run(watch) if launch.alone else plan.lead(launch, context.meta["words"], watch)
    cells = {"size": size, "vision_mass_last": percent, "vision_mass_decode": percent}
    show([_summary(run)], form, cells=cells)
    missing = _missing(plan, run)
    if missing:
        note(
            f"{missing} of {counted(len(plan.samples), 'sample')} {'is' if missing == 1 else 'are'} "
            "not there yet; the other processes write them"
        )
    finished([run.path], f"avlprof analyze {run.path}")


def _shard(launch: Launch) -> Shard:
    """This process among those that trace: of torchrun or SLURM, or one that a launcher started."""
    from avlprof.api.trace import QUEUE
    from avlprof.launchers import NUMBER, WORKER
    from avlprof.runs import Shard

    shard = Shard.from_environment(os.environ)
    if QUEUE in os.environ:
        return replace(shard, local=int(os.environ.get(NUMBER, "0")), member=os.environ[WORKER])
    if shard.count > 1 and not launch.alone:
        raise UserError(
            f"--workers {launch.workers} and {shard.count} processes of torchrun or SLURM were asked for; "
            "leave one of them out"
        )
    return shard


def _trace_beside(plan: TracePlan) -> None:
    """The share of a process that is not the first: it draws no progress and prints no results."""
    run = plan.run()
    there = len(plan.samples) - _missing(plan, run)
    note(
        f"process {plan.shard.index + 1} of {plan.shard.count} has finished; "
        f"{there} of {counted(len(plan.samples), 'sample')} {'is' if there == 1 else 'are'} in {run.path}"
    )


def _missing(plan: TracePlan, run: Run) -> int:
    """How many of the samples asked for the run directory does not hold."""
    return len({sample.id for sample in plan.samples} - set(run.directory.ids()))


def _summary(run: Run) -> dict[str, Any]:
    """What was traced, and how much of the attention went to the picture."""
    import pandas as pd

    samples = run.samples()
    parts = run.directory.stats_by_part(["query", "mass_vision"])
    sums = pd.concat([part.groupby("query")["mass_vision"].agg(["sum", "count"]) for part in parts])
    whole = sums.groupby(level=0).sum()
    seen = whole["sum"] / whole["count"]
    return {
        "samples": len(samples),
        "layers": run.meta.layers,
        "vision_tokens": float(samples["vision"].mean()),
        "answer_tokens": float(samples["generated"].mean()),
        "vision_mass_last": float(seen.get("last", float("nan"))),
        "vision_mass_decode": float(seen.get("generated", float("nan"))),
        "seconds_each": float(samples["seconds"].mean()),
        "size": sum(file.stat().st_size for file in run.path.iterdir() if file.is_file()),
    }
