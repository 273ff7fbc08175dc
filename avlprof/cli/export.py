"""`avlprof export`: a policy as YAML, or as a file that another engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlprof.cli._output import finished, note
from avlprof.files import check_output

if TYPE_CHECKING:
    from avlprof.policy import Policy, PromptShape
    from avlprof.run import Run

app = typer.Typer(add_completion=False)

YAML = "yaml"


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="STUDY", help="Folder of a study; or a policy file or shipped name.")
    ],
    trial: Annotated[
        int | None, typer.Option("--trial", help="Take this trial instead of the winner.")
    ] = None,
    max_read: Annotated[
        float | None,
        typer.Option("--max-read", help="Take the best trial that reads at most this share per step."),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="Who is to read it: yaml, kvpress, sparse-engine or tensorrt-llm.")
    ] = YAML,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Layers of the model, for a policy that does not list them."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            help="A typical prompt for engines that count tokens: SYSTEM,VISION,TEXT, as in 14,576,30.",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", help="Traced run in place of --layers and --tokens: its longest prompt counts."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; without it, stdout.")] = None,
) -> None:
    """Write the winner, a trial, or a point of the front of a study as a policy file.

    With --to it becomes a file of another engine, which says at its head what is lost on the way.
    """
    from avlprof.files import write_text
    from avlprof.policy import dump_policy, save_policy
    from avlprof.policy.export import TARGETS, export_to
    from avlprof.run import Run

    check_output(out)
    prompt = _prompt(tokens)
    traced = None if run is None else Run.open(run)
    if to != YAML:
        TARGETS.get(to)
    policy = _policy(source, trial, max_read)
    if to == YAML:
        if out is None:
            typer.echo(dump_policy(policy), nl=False)
        else:
            finished([save_policy(policy, out)], f"avlprof policy show {out}")
        return
    if traced is not None:
        layers, prompt = layers or traced.meta.layers, prompt or _longest(traced)
    policy = _resolved(policy, layers, traced)
    handed = export_to(to, policy, policy.layers or layers or 0, prompt)
    if out is None:
        typer.echo(handed.text, nl=False)
        return
    write_text(out, handed.text)
    for line in handed.lost:
        note(f"lost: {line}")
    finished([out])


def _policy(source: str, trial: int | None, max_read: float | None) -> Policy:
    """Of a study, or where the source is a file or the name of one that ships, that policy."""
    from avlprof.errors import UserError
    from avlprof.files import checked_path
    from avlprof.policy import DENSE, find_policy, shipped
    from avlprof.tuning import export_policy

    path = checked_path(source, "study")
    named = not path.exists() and (path.suffix in (".yaml", ".yml") or source in (DENSE.name, *shipped()))
    if not (path.is_file() or named):
        return export_policy(path, trial, max_read)
    if trial is not None or max_read is not None:
        raise UserError(f"--trial and --max-read choose of a study, and {source} is a policy; leave them out")
    return find_policy(source)


def _longest(run: Run) -> PromptShape:
    """The token counts of the run's longest prompt."""
    from avlprof.policy import PromptShape

    rows = run.samples()[["system", "vision", "text"]].itertuples(index=False)
    return max((PromptShape(int(a), int(b), int(c)) for a, b, c in rows), key=lambda prompt: prompt.total)


def _resolved(policy: Policy, layers: int | None, run: Run | None) -> Policy:
    """With a share for each layer, from their number or a profile; `UserError` where that does not do."""
    from avlprof.budgets.resolve import resolve, resolve_by_depth
    from avlprof.errors import UserError
    from avlprof.policy import acts_on

    count = policy.layers or layers
    if count is None:
        raise UserError(f"policy '{policy.name}' is for models of any depth; give --layers or --run of yours")
    if layers is not None:
        policy.model_copy(update={"allocator": None}).check_layers(layers)
    if policy.allocator is not None and run is not None:
        return resolve(policy, run.profile().evidence())
    return resolve_by_depth(policy, count, acts_on(policy))


def _prompt(text: str | None) -> PromptShape | None:
    """`14,576,30` as a prompt of so many system, vision and text tokens."""
    from avlprof.errors import UserError, shortened
    from avlprof.policy import PromptShape

    if text is None:
        return None
    parts = text.split(",")
    counts = [
        int(part) for part in parts if part.strip().isascii() and part.strip().isdigit() and len(part) < 10
    ]
    if len(parts) != 3 or len(counts) != 3 or counts[1] < 1:
        raise UserError(
            "--tokens must be three counts with commas, system, vision (1 or more) and text tokens of a "
            f"prompt, as in 14,576,30, got {shortened(text)}"
        )
    return PromptShape(counts[0], counts[1], counts[2])
