"""`avlprof tune`: search for the best policy at a budget, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avlprof.cli import _options as given
from avlprof.cli._live import board
from avlprof.cli._output import (
    Format,
    FormatOption,
    finished,
    note,
)

app = typer.Typer()

_SEVERAL = "Several budgets"
DEFAULT = 0.2


@app.command()
def tune(
    model: given.ModelOption = "tiny",
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task name, FILE.jsonl, folder or dataset.")
    ] = "shapes",
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            "-b",
            help="Prompt KV in memory after prefill, as a share of dense; 0.2 unless told.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="Several, as in 0.1,0.2,0.4: a front.", rich_help_panel=_SEVERAL),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="Look for the smallest budget that loses at most this much of the task's metric.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    read_budget: Annotated[
        float | None,
        typer.Option("--read-budget", help="Prompt KV read per step; tunes compute shares and K as well."),
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="What trials are scored by: fidelity, likelihood or accuracy.")
    ] = "fidelity",
    text: Annotated[
        str,
        typer.Option("--text", help="all stays, trade it for vision, or auto: only below what it needs."),
    ] = "auto",
    sampler: Annotated[
        str, typer.Option("--sampler", help="Who proposes trials: tpe, gp, cmaes or random.")
    ] = "tpe",
    trials: Annotated[int, typer.Option("--trials", help="Trials of each study in all.")] = 50,
    refine: Annotated[
        int | None,
        typer.Option(
            "--refine",
            help="How many of the trials refine layer by layer; a third unless told.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples a trial is scored on.")] = 64,
    proof_samples: Annotated[
        int, typer.Option("--proof-samples", help="Held-out samples of the proof.")
    ] = 100,
    margin: Annotated[
        float,
        typer.Option("--margin", help="Loss of the metric that still counts as not inferior."),
    ] = 0.02,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampler.")] = 0,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Traced run; by default the newest that fits, or one is made."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the study; by default below studies/.")
    ] = None,
    max_new_tokens: given.MaxNewTokensOption = None,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop clearly worse trials early.")
    ] = True,
    workers: Annotated[
        int,
        typer.Option("--workers", help="Processes here that run trials.", rich_help_panel="Workers"),
    ] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", help="PostgreSQL URL for the trials, to share them.", rich_help_panel="Workers"
        ),
    ] = None,
    device: given.DeviceOption = "auto",
    dtype: given.DtypeOption = "auto",
    revision: given.RevisionOption = None,
    trust_remote_code: given.TrustOption = False,
    form: FormatOption = Format.table,
) -> None:
    """Find the best policy at a budget of prompt KV, and compare it on held-out samples.

    The study is a folder; the same command resumes it.
    """
    from avlprof.api import tune as search
    from avlprof.cli import _tuned as shown
    from avlprof.errors import UserError
    from avlprof.tuning import Settings, Space

    if sum(value is not None for value in (budget, budgets, max_drop)) > 1:
        raise UserError("give one of --budget, --budgets and --max-drop")
    share = DEFAULT if budget is None else budget
    asked: dict[str, Any] = {
        "read_budget": read_budget, "objective": objective, "sampler": sampler, "trials": trials,
        "refine": refine, "samples": samples, "proof_samples": proof_samples, "margin": margin,
        "seed": seed, "prune": prune, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    settings = Settings(budget=share, **asked)
    other = "" if model == "tiny" else f" --model {model}"
    with board() as live:
        given_too: dict[str, Any] = {
            "run": run, "out": out, "device": device, "dtype": dtype, "revision": revision,
            "trust_remote_code": trust_remote_code, "space": Space(text=text), "told": live.tell,
            "progress": live.progress, "on_trial": live.on_trial, "workers": workers, "storage": storage,
        }  # fmt: skip
        if budgets is not None:
            swept = search.sweep(
                model,
                task,
                given.parse_shares("--budgets", budgets),
                settings,
                on_budget=live.on_budget,
                **given_too,
            )
        elif max_drop is not None:
            least = search.smallest(model, task, max_drop, settings, on_budget=live.on_budget, **given_too)
        else:
            live.on_budget(share)
            found = search.tune(model, task, budget=share, **asked, **given_too)
    if budgets is not None:
        wrote = shown.draw_sweep(swept)
        shown.print_sweep(swept, form)
        policies = " ".join(f"--policy {one.folder / 'policy.yaml'}" for one in swept.studies)
        finished([*wrote, swept.folder / "front.csv"], f"avlprof evaluate{other} {policies} --task {task}")
        return
    if max_drop is not None:
        found = least.tuned
    wrote = shown.draw(found)
    shown.print_proof(found, form)
    if max_drop is not None:
        note(least.sentence())
    policy = found.folder / "policy.yaml"
    then = f"avlprof evaluate{other} --policy {policy} --task {task}"
    finished([*wrote, found.folder / "proof.csv", policy], then)
