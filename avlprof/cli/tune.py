"""`avlprof tune`: search for the best policy at a budget, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlprof.cli import _options as options
from avlprof.cli._live import board
from avlprof.cli._output import Format, FormatOption, finished, note
from avlprof.errors import UserError
from avlprof.tuning.settings import BUDGET, Settings
from avlprof.tuning.space import Space

if TYPE_CHECKING:
    from avlprof.tuning import Sweep, Tuned

app = typer.Typer()

_SEVERAL = "Several budgets"


@app.command()
def tune(
    model: options.ModelOption = "tiny",
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task name, FILE.jsonl, folder or dataset.")
    ] = "shapes",
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            "-b",
            help=f"Prompt KV in memory after prefill, as a share of dense; {BUDGET:g} unless told.",
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
    ] = Settings.read_budget,
    objective: Annotated[
        str, typer.Option("--objective", help="What trials are scored by: fidelity, likelihood or accuracy.")
    ] = Settings.objective,
    text: Annotated[
        str,
        typer.Option("--text", help="all stays, trade it for vision, or auto: only below what it needs."),
    ] = Space.text,
    sampler: Annotated[
        str, typer.Option("--sampler", help="Who proposes trials: tpe, gp, cmaes or random.")
    ] = Settings.sampler,
    trials: Annotated[int, typer.Option("--trials", help="Trials of each study in all.")] = Settings.trials,
    refine: Annotated[
        int | None,
        typer.Option(
            "--refine",
            help="How many of the trials refine layer by layer; a third unless told.",
            show_default=False,
        ),
    ] = Settings.refine,
    samples: Annotated[
        int, typer.Option("--samples", "-n", help="Samples a trial is scored on.")
    ] = Settings.samples,
    proof_samples: Annotated[
        int, typer.Option("--proof-samples", help="Held-out samples of the proof.")
    ] = Settings.proof_samples,
    margin: Annotated[
        float,
        typer.Option("--margin", help="Loss of the metric that still counts as not inferior."),
    ] = Settings.margin,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampler.")] = Settings.seed,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Traced run; by default the newest that fits, or one is made."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the study; by default below studies/.")
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = Settings.max_new_tokens,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop clearly worse trials early.")
    ] = Settings.prune,
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
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustOption = False,
    form: FormatOption = Format.table,
) -> None:
    """Find the best policy at a budget of prompt KV, and compare it on held-out samples.

    The study is a folder; the same command resumes it.
    """
    from avlprof.api import tune as verbs
    from avlprof.models import ModelSpec
    from avlprof.tuning import Workers

    if sum(value is not None for value in (budget, budgets, max_drop)) > 1:
        raise UserError("give one of --budget, --budgets and --max-drop")
    settings = Settings(
        read_budget=read_budget, trials=trials, refine=refine, samples=samples,
        proof_samples=proof_samples, seed=seed, prune=prune, objective=objective, sampler=sampler,
        margin=margin, max_new_tokens=max_new_tokens, space=Space(text=text),
    )  # fmt: skip
    spec = ModelSpec(model, device, dtype, revision, trust_remote_code)
    by = Workers(workers, storage)
    with board() as watch:
        if budgets is not None:
            shares = options.parse_shares("--budgets", budgets)
            swept = verbs.sweep(spec, task, shares, settings, run=run, out=out, workers=by, watch=watch)
        elif max_drop is not None:
            least = verbs.smallest(spec, task, max_drop, settings, run=run, out=out, workers=by, watch=watch)
        else:
            share = BUDGET if budget is None else budget
            watch.budget(share)
            tuned = verbs.tune(spec, task, share, settings, run=run, out=out, workers=by, watch=watch)
    evaluate = "avlprof evaluate" + ("" if model == ModelSpec.name else f" --model {model}")
    if budgets is not None:
        _show_sweep(swept, form, evaluate, task)
    elif max_drop is not None:
        _show(least.tuned, form, evaluate, task, least.sentence())
    else:
        _show(tuned, form, evaluate, task)


def _show(tuned: Tuned, form: Format, evaluate: str, task: str, sentence: str = "") -> None:
    """The figures and the closing table of a study, a last sentence, and what to run next."""
    from avlprof.cli import _tuned

    wrote = _tuned.draw(tuned)
    _tuned.print_proof(tuned, form)
    if sentence:
        note(sentence)
    policy = tuned.folder / "policy.yaml"
    finished([*wrote, tuned.folder / "proof.csv", policy], f"{evaluate} --policy {policy} --task {task}")


def _show_sweep(swept: Sweep, form: Format, evaluate: str, task: str) -> None:
    """The figures and the closing table of a sweep, and what to run next."""
    from avlprof.cli import _tuned

    wrote = _tuned.draw_sweep(swept)
    _tuned.print_sweep(swept, form)
    policies = " ".join(f"--policy {one.folder / 'policy.yaml'}" for one in swept.studies)
    finished([*wrote, swept.folder / "front.csv"], f"{evaluate} {policies} --task {task}")
