"""Options of `avlprof bench`, and how its tables are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._output import (
    Cells,
    Format,
    finished,
    note,
    show,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avlprof.bench.shapes import DecoderShape


ShapeOption = Annotated[
    str,
    typer.Option("--shape", help="llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b, tiny, or custom with --sizes"),
]
LayersOption = Annotated[
    int | None, typer.Option("--layers", min=1, help="Decoder layers; by default the shape's.")
]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Times each way is measured.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of torch; by default its own choice.")
]
SaveOption = Annotated[Path | None, typer.Option("--out", "-o", help="Write the table to this CSV file too.")]
SizesOption = Annotated[
    str | None,
    typer.Option(
        "--sizes", help="Other sizes of the shape, as in hidden=2048,intermediate=64,vocabulary=512."
    ),
]


def shape_of(name: str, sizes: str | None) -> DecoderShape:
    """The shape of a name with other sizes, `NAME=COUNT` with commas between.

    Raises:
        UserError: an unknown shape or size, or a count that is not a whole number.
    """
    from avlprof.bench.shapes import decoder_shape
    from avlprof.errors import UserError

    changes = {}
    for part in sizes.split(",") if sizes else []:
        size, _, count = part.partition("=")
        if not count.isdigit():
            raise UserError(f"--sizes must be like hidden=2048,intermediate=64, got '{part}'")
        changes[size.strip()] = int(count)
    return decoder_shape(name, **changes)


def device_and_dtype(device: str, dtype: str, threads: int | None) -> tuple[Any, Any]:
    """Device and dtype of a bench, with torch told its threads."""
    import torch

    from avlprof.models.placement import resolve_device, resolve_dtype

    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    return where, resolve_dtype(dtype, where, None, hub=True)


def counts(option: str, text: str) -> list[int]:
    """Whole numbers with commas between; `UserError` for anything else."""
    from avlprof.errors import UserError

    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"{option} must be whole numbers above 0 with commas between, got '{text}'")
    return counts


def describe(shape: DecoderShape, layers: int | None, device: Any, dtype: Any) -> None:
    """Say on stderr what the numbers are of."""
    import platform

    import torch

    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else platform.processor()
    used = f"{layers} of {shape.layers} layers" if layers else f"{shape.layers} layers"
    threads = "" if str(device).startswith("cuda") else f", {torch.get_num_threads()} threads"
    kind = str(dtype).removeprefix("torch.")
    note(f"{shape.name}, {used}, {kind}, {name or 'CPU'}{threads}, torch {torch.__version__}")


def print_costs(
    rows: Sequence[dict[str, Any]], columns: list[str], form: Format, out: Path | None, cells: Cells
) -> None:
    """The table, with the columns in which something is known; all fields as JSON, CSV and in `out`."""
    if form is Format.table:
        present = [{name: row[name] for name in columns if any(r[name] for r in rows)} for row in rows]
        show(present, form, cells=cells)
    else:
        show(rows, form)
    if out is not None:
        import pandas as pd

        from avlprof.files import write_text

        write_text(out, pd.DataFrame(list(rows)).to_csv(index=False))
        finished([out])
