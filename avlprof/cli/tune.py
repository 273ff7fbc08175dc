"""`avlprof tune`: search for the best policy at a budget, and prove it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli import options as given
from avlprof.cli.output import Format, FormatOption, finished, note, percent, show, size
from avlprof.cli.progress import phases

if TYPE_CHECKING:
    import optuna

    from avlprof.tuning import Tuned

app = typer.Typer()


@app.command()
def tune(
    model: given.ModelOption = "tiny",
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task name, FILE.jsonl, folder or dataset.")
    ] = "shapes",
    budget: Annotated[
        float, typer.Option("--budget", "-b", help="Prompt KV in memory after prefill, as a share of dense.")
    ] = 0.2,
    read_budget: Annotated[
        float | None,
        typer.Option("--read-budget", help="Prompt KV read per step; tunes compute shares and K as well."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", help="Trials of the study in all.")] = 50,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples a trial is scored on.")] = 64,
    proof_samples: Annotated[
        int, typer.Option("--proof-samples", help="Held-out samples of the proof.")
    ] = 100,
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
    device: given.DeviceOption = "auto",
    dtype: given.DtypeOption = "auto",
    revision: given.RevisionOption = None,
    trust_remote_code: given.TrustOption = False,
    form: FormatOption = Format.table,
) -> None:
    """Find the best policy at a budget of prompt KV, and compare it on held-out samples.

    The study is a folder; the same command resumes it.
    """
    from avlprof.search import tune as search

    with phases() as report:
        found = search(
            model, task, budget=budget, read_budget=read_budget, trials=trials, samples=samples,
            proof_samples=proof_samples, seed=seed, run=run, out=out, max_new_tokens=max_new_tokens,
            prune=prune, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code,
            progress=report, on_trial=_told(),
        )  # fmt: skip
    wrote = draw(found)
    print_proof(found, form)
    policy = found.folder / "policy.yaml"
    other = "" if model == "tiny" else f" --model {model}"
    then = f"avlprof evaluate{other} --policy {policy} --task {task}"
    finished([*wrote, found.folder / "proof.csv", policy], then)


def _told() -> Any:
    """Tell of each trial that is the best so far."""
    best = [float("inf")]

    def on_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.value is not None and trial.user_attrs.get("complete") and trial.value < best[0]:
            best[0] = trial.value
            params = trial.params
            note(
                f"trial {trial.number}: KL {trial.value:.4f} nat per token "
                f"({params['allocator']}, {params['scorer']}, mix {params['mix']:.2f})"
            )

    return on_trial


def draw(found: Tuned) -> list[Path]:
    """The figures of a study: score by trial, the winner's layers, and the proof."""
    import pandas as pd

    from avlprof import plots

    trials = [t for t in found.study.get_trials(deepcopy=False) if t.value is not None]
    history = pd.DataFrame(
        {
            "trial": [t.number for t in trials],
            "value": [t.value for t in trials],
            "state": ["COMPLETE" if t.user_attrs.get("complete") else "PRUNED" for t in trials],
        }
    )
    folder = found.folder / "figures"
    label = f"{found.proof.meta['metric'].replace('_', ' ')} ({found.proof.meta['split']})"
    figures = {
        "trials": plots.trial_history(history),
        "layers": plots.policy_layers(found.policy, layers=found.policy.layers or 1),
        "proof": plots.pareto_front(found.proof.pareto(), score=label),
    }
    for name, figure in figures.items():
        plots.save_figure(figure, folder / f"{name}.png")
    return [folder]


def print_proof(found: Tuned, form: Format) -> None:
    """The closing table: who scored what at which bytes, on samples the search never saw."""
    summary = [{str(k): v for k, v in row.items()} for row in found.proof.summary().to_dict("records")]
    if form is not Format.table:
        show(summary, form)
        return
    meta = found.proof.meta
    rows = [
        {
            "policy": row["policy"],
            str(meta["metric"]): f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            "KV live": row["live_share"],
            "KV read": row["read_share"],
            "live": row["live_bytes"],
        }
        for row in summary
    ]
    title = f"{meta['task']}, {meta['samples']} {meta['split']} samples; 95% intervals"
    show(rows, form, title, {"KV live": percent, "KV read": percent, "live": size})
    for line in found.comparisons():
        note(line)
    sys.stdout.flush()
