"""`avlprof demo`: the whole loop on the embedded model, command by command."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from avlprof.cli._output import note
from avlprof.cli._progress import duration
from avlprof.files import check_output

app = typer.Typer(add_completion=False)

TASK = "shapes:describe,read,row"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of everything that is made.")] = Path(
        "demo"
    ),
    budget: Annotated[float, typer.Option("--budget", "-b", help="Prompt KV of the tuned policy.")] = 0.2,
    trials: Annotated[int, typer.Option("--trials", help="Trials of the search.")] = 40,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples a trial is scored on.")] = 48,
    proof_samples: Annotated[
        int, typer.Option("--proof-samples", help="Held-out samples of the proof.")
    ] = 120,
) -> None:
    """Trace, analyse, derive, run, tune and prove on the embedded model, in a few minutes on a CPU."""
    from avlprof.cli._app import app as commands

    run, study, tuned = out / "run", out / "study", out / "tuned.yaml"
    steps = [
        ("Where does the model look?", f"trace --task {TASK} --samples 32 --out {run}"),
        ("What does each layer need?", f"analyze {run}"),
        ("A policy from the attention alone:", f"derive {run} --budget {budget:g} -o {out / 'derived.yaml'}"),
        (
            "A policy tuned against the dense model, and proved on samples it never saw:",
            f"tune --task {TASK} --budget {budget:g} --trials {trials} --samples {samples} "
            f"--proof-samples {proof_samples} --run {run} --out {study}",
        ),
        ("The policy as a file:", f"export {study} -o {tuned}"),
        ("The policy at work on one picture, beside dense:", f"run --policy {tuned} --explain --no-speed"),
    ]
    check_output(out, folder=True)
    began = time.monotonic()
    for number, (why, line) in enumerate(steps, 1):
        note(f"\n[{number}/{len(steps)}] {why}\n$ avlprof {line}")
        commands(shlex.split(line), prog_name="avlprof", standalone_mode=False)
    note(f"\nthe whole loop took {duration(time.monotonic() - began)}")
    note(f"figures: {run / 'figures'} and {study / 'figures'}")
    note("next: avlprof trace --model llava --image your.png --prompt 'What is this?'")
