"""`avlprof policy`: list, show, check and compare policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from avlprof.cli._output import (
    Format,
    FormatOption,
    note,
    show,
)
from avlprof.errors import UserError
from avlprof.files import check_output

app = typer.Typer(help="List, show, check and compare policies.", no_args_is_help=True, add_completion=False)

PolicyArgument = Annotated[
    str, typer.Argument(metavar="POLICY", help="A YAML file, or a name from 'policy ls'.")
]
LayersOption = Annotated[
    int | None, typer.Option("--layers", min=1, help="Number of layers of the model it is meant for.")
]


@app.command("ls")
def list_policies(form: FormatOption = Format.table) -> None:
    """List the policies that come with avlprof, and whether this version can run them."""
    from avlprof.cli._describe import sets
    from avlprof.policy import DENSE, load_policy, shipped

    policies = {DENSE.name: DENSE} | {name: load_policy(path) for name, path in shipped().items()}
    rows = [
        {"name": name, "sets": sets(policy), "runs": _runs(policy), "source": policy.source}
        for name, policy in policies.items()
    ]
    if form is Format.table:
        rows = [row | {"source": row["source"].split(";")[0]} for row in rows]
    show(rows, form)
    note("next: avlprof policy show NAME, avlprof run --policy NAME")


@app.command("show")
def show_policy(
    policy: PolicyArgument, layers: LayersOption = None, form: FormatOption = Format.table
) -> None:
    """Print a policy: as YAML, as JSON, or as a CSV with one row a layer (give --layers)."""
    from avlprof.cli._describe import layer_rows
    from avlprof.policy import dump_policy, find_policy

    chosen = find_policy(policy)
    if layers is not None and chosen.allocator is None:
        chosen.check_layers(layers)
    if form is Format.json:
        typer.echo(json.dumps(chosen.model_dump(mode="json", by_alias=True), indent=2))
    elif form is Format.csv:
        show(layer_rows(chosen, layers or chosen.layers or 1), form)
    else:
        typer.echo(dump_policy(chosen), nl=False)


@app.command()
def validate(
    policies: Annotated[list[str], typer.Argument(metavar="POLICY...", help="YAML files or names.")],
    layers: LayersOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Check policies against the schema, a number of layers, and what this version can run."""
    from avlprof.cli._describe import sets
    from avlprof.policy import find_policy

    rows, problems = [], []
    for name in policies:
        try:
            policy = find_policy(name)
            if layers is not None and policy.allocator is None:
                policy.check_layers(layers)
            runs = _runs(policy)
        except UserError as error:
            problems.append(str(error))
            continue
        rows.append({"policy": name, "layers": policy.layers, "sets": sets(policy), "runs": runs})
    if rows:
        show(rows, form, cells={"layers": lambda count: "any" if count is None else str(count)})
    for problem in problems:
        note(f"error: {problem}")
    if problems:
        raise typer.Exit(2)


@app.command()
def diff(first: PolicyArgument, second: PolicyArgument, form: FormatOption = Format.table) -> None:
    """Print the fields, and the layers, in which two policies act differently."""
    from avlprof.cli._describe import differences
    from avlprof.policy import find_policy

    rows = differences(find_policy(first), find_policy(second))
    table: list[dict[str, Any]] = [
        {"field": row["field"], "layer": row["layer"], first: row["first"], second: row["second"]}
        if first != second
        else row
        for row in rows
    ]
    if rows or form is not Format.table:
        show(table, form, cells={"layer": lambda layer: "all" if layer is None else str(layer)})
    if not rows:
        note(f"{first} and {second} act alike")


@app.command("resolve")
def resolve_policy(
    policy: PolicyArgument,
    run: Annotated[
        Path | None, typer.Option("--run", help="Run directory whose profile the allocator looks at.")
    ] = None,
    layers: LayersOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to a file instead.")] = None,
) -> None:
    """Work out the share of each layer that a policy leaves to an allocator."""
    from avlprof.allocators import Evidence
    from avlprof.budgets.resolve import resolve
    from avlprof.cli._output import finished
    from avlprof.policy import dump_policy, find_policy, save_policy

    check_output(out)
    chosen = find_policy(policy)
    if run is not None:
        from avlprof.run import Run

        evidence = Run.open(run).profile().evidence()
    elif layers is not None:
        evidence = Evidence(layers=layers, tokens=0)
    else:
        raise UserError("give --run, or --layers for an allocator that looks at nothing else")
    clear = resolve(chosen, evidence)
    if out is None:
        typer.echo(dump_policy(clear), nl=False)
    else:
        save_policy(clear, out)
        finished([out], f"avlprof run --policy {out}")


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to a file instead.")] = None,
) -> None:
    """Print the JSON schema of policy files, for editors and other tools."""
    from avlprof.cli._output import finished
    from avlprof.files import write_text
    from avlprof.policy import Policy

    check_output(out)
    text = json.dumps(Policy.model_json_schema(by_alias=True), indent=2)
    if out is None:
        typer.echo(text)
    else:
        write_text(out, text + "\n")
        finished([out])


def _runs(policy: Any) -> str:
    """`yes`, what it needs first, or what this version cannot run; `UserError` for an unknown scorer."""
    from avlprof.allocators import ALLOCATORS
    from avlprof.budgets.resolve import resolve_by_depth
    from avlprof.runtime.support import unsupported
    from avlprof.scorers import make_scorer

    make_scorer(policy.scorer)
    what = unsupported(policy)
    if what is not None:
        return f"not yet: {what}"
    if policy.allocator is not None:
        ALLOCATORS.get(policy.allocator.name)
        try:
            resolve_by_depth(policy, 8)
        except UserError:
            return "with a profile"
    return "yes"
