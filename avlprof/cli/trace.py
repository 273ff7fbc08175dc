"""`avlprof trace`: let a model answer and record where it looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli import options as given
from avlprof.cli.output import Format, FormatOption, finished, note, percent, show, size
from avlprof.cli.progress import progress

if TYPE_CHECKING:
    from avlprof.traced import Run

app = typer.Typer()
_DATASET = "Hugging Face datasets"


@app.command()
def trace(
    model: given.ModelOption = "tiny",
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task name, FILE.jsonl, folder or dataset.")
    ] = "shapes",
    samples: Annotated[int, typer.Option("--samples", "-n", help="How many samples.")] = 64,
    split: Annotated[str, typer.Option("--split", help="Which split of the task.")] = "search",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; by default runs/<model>-<task>.")
    ] = None,
    image: given.ImageOption = None,
    prompt: given.PromptOption = None,
    max_new_tokens: given.MaxNewTokensOption = None,
    rows: Annotated[
        str, typer.Option("--rows", help="Rows of a prompt to record: default, or all (slower).")
    ] = "default",
    vision_rows: Annotated[int, typer.Option("--vision-rows", help="Vision rows recorded by default.")] = 64,
    device: given.DeviceOption = "auto",
    dtype: given.DtypeOption = "auto",
    revision: given.RevisionOption = None,
    trust_remote_code: given.TrustOption = False,
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Such as prompt=question,answers=label.", rich_help_panel=_DATASET),
    ] = None,
    dataset_split: Annotated[
        str | None, typer.Option("--dataset-split", help="Split to draw from.", rich_help_panel=_DATASET)
    ] = None,
    dataset_config: Annotated[
        str | None, typer.Option("--dataset-config", help="Configuration.", rich_help_panel=_DATASET)
    ] = None,
    form: FormatOption = Format.table,
) -> None:
    """Let a model answer samples and record the attention of every layer and head.

    Samples that the run directory holds already are skipped, so the same command resumes.
    """
    from avlprof.api import plan_trace
    from avlprof.tasks import load_task

    own = bool(image) or prompt is not None
    plan = plan_trace(
        model,
        "shapes" if own else load_task(task, columns=columns, split=dataset_split, config=dataset_config),
        samples,
        split=split,
        image=image or (),
        prompt=prompt,
        out=out,
        max_new_tokens=max_new_tokens,
        rows=rows,
        vision_rows=vision_rows,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    price = " (every row of each prompt, which is slower)" if rows == "all" else ""
    most = size(plan.estimated_bytes)
    note(f"{len(plan.samples)} samples to {plan.out}, at most about {most} on disk{price}")
    with progress("trace", resumes=True) as report:
        run = plan.run(report)
    cells = {"size": size, "vision_mass_last": percent, "vision_mass_decode": percent}
    show([_summary(run)], form, cells=cells)
    finished([run.path], f"avlprof analyze {run.path}")


def _summary(run: Run) -> dict[str, Any]:
    """What was traced, and how much of the attention went to the picture."""
    samples, stats = run.samples(), run.stats()
    seen = stats.groupby("query")["mass_vision"].mean()
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
