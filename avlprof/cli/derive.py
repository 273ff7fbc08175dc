"""`avlprof derive`: from a run's profile to a policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, cast

import typer

from avlprof.cli import _options as options
from avlprof.cli._options import run_or_newest
from avlprof.cli._output import (
    Format,
    FormatOption,
    finished,
    note,
    show,
)
from avlprof.cli._progress import bars
from avlprof.errors import UserError, counted
from avlprof.files import check_output

app = typer.Typer(add_completion=False)


@app.command()
def derive(
    run: options.RunArgument = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", "-b", help="Prompt KV in memory after prefill, as a share of dense."),
    ] = None,
    read_budget: Annotated[
        float | None, typer.Option("--read-budget", help="Prompt KV read per step, as a share of dense.")
    ] = None,
    coverage: Annotated[
        float | None, typer.Option("--coverage", help="In place of a budget: share of attention to hold.")
    ] = None,
    allocator: Annotated[
        str,
        typer.Option(
            "--allocator",
            help="How the budget is spread: uniform, pyramid, sigmoid, coverage, sparsity, entropy, strength "
            "(sensitivity needs the probe of 'avlprof tune').",
        ),
    ] = "coverage",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="A knob of the allocator, as steepness=6."),
    ] = None,
    mix: Annotated[float, typer.Option("--mix", help="Weight of the allocator against uniform.")] = 0.2,
    floor: Annotated[float, typer.Option("--floor", help="Smallest kept share of a layer.")] = 0.01,
    refresh_interval: Annotated[
        int | None,
        typer.Option("--refresh-interval", help="Steps between refreshes; by default from the drift."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", help="How vision tokens are ranked; by default as won most."),
    ] = None,
    text_share: Annotated[
        float | None,
        typer.Option("--text-share", help="Give each layer the text window that holds this share of text."),
    ] = None,
    heads: Annotated[
        str,
        typer.Option(
            "--heads",
            help="Vision tokens of a layer: one set (shared), one for each KV head (kv_head), or as many for "
            "each as it needs by a run with --per-head (adaptive).",
        ),
    ] = "shared",
    name: Annotated[str | None, typer.Option("--name", help="Name of the policy.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Policy file; by default RUN/<name>.yaml, - is stdout.")
    ] = None,
    form: FormatOption = Format.table,
) -> None:
    """Derive a policy from a run, at a budget of KV bytes or at a coverage of attention."""
    from avlprof.analysis import Spread
    from avlprof.cli._describe import layer_rows
    from avlprof.policy import RANKING, Heads, dump_policy, said_governed, save_policy

    if str(out) != "-":
        check_output(out)
    traced = run_or_newest(run)
    if out is None:
        check_output(traced.path / "policy.yaml")
    with bars() as watch:
        profile = traced.profile(watch)
    policy = profile.derive(
        budget,
        read_budget=read_budget,
        coverage=coverage,
        allocator=Spread(allocator, _numbers(option or []), mix, floor),
        refresh_interval=refresh_interval,
        scorer=scorer or RANKING,
        text=text_share,
        name=name,
    )
    if heads != policy.heads:
        policy = profile.with_heads(policy, cast(Heads, heads))
        policy = policy if name else policy.model_copy(update={"name": f"{policy.name}-{heads}"})
    if str(out) == "-":
        typer.echo(dump_policy(policy), nl=False)
        return
    path = save_policy(policy, out or traced.path / f"{file_name(policy.name)}.yaml")
    show(layer_rows(policy, profile.layers), form)
    if said := said_governed(profile.governed, profile.layers):
        note(said)
    origin = policy.provenance
    if origin is not None:
        note(
            f"prompt KV on {counted(origin.samples or 0, 'traced sample')}, as shares of dense: "
            f"live {origin.measured_budget:.4g}, read {origin.measured_read_budget:.4g} a step"
        )
    finished([path], f"avlprof run --policy {path} --model {traced.meta.model} --explain")


def file_name(name: str) -> str:
    """A policy's name as that of a file: no folder above it, and no dot in front."""
    return re.sub(r"[^\w.@+=-]+", "-", name).lstrip(".") or "policy"


def _numbers(pairs: list[str]) -> dict[str, float]:
    """Knobs by name; `UserError` for what is not NAME=NUMBER."""
    numbers = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise UserError(f"--option must be NAME=NUMBER, got '{pair}'") from None
    return numbers
