"""Options of `avlprof bench`, and how its tables are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli.output import Cells, Format, finished, note, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avlprof.evaluation.bench.shapes import DecoderShape

ShapeOption = Annotated[
    str,
    typer.Option(
        "--shape", help="llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b, tiny, or custom with --hidden ..."
    ),
]
LayersOption = Annotated[
    int | None, typer.Option("--layers", min=1, help="Decoder layers; by default the shape's.")
]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Times each way is measured.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of torch; by default its own choice.")
]
SaveOption = Annotated[Path | None, typer.Option("--out", "-o", help="Write the table to this CSV file too.")]
_SIZES = "Sizes of the shape"


def _size(name: str, text: str) -> Any:
    return typer.Option(f"--{name}", min=1, help=text, rich_help_panel=_SIZES)


HiddenOption = Annotated[int | None, _size("hidden", "Width of the decoder.")]
MlpOption = Annotated[int | None, _size("intermediate", "Width of its MLP.")]
HeadsOption = Annotated[int | None, _size("heads", "Query heads.")]
KVHeadsOption = Annotated[int | None, _size("kv-heads", "Key-value heads.")]
VocabularyOption = Annotated[int | None, _size("vocabulary", "Tokens of the vocabulary.")]


def place(device: str, dtype: str, threads: int | None) -> tuple[Any, Any]:
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
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"{option} must be whole numbers above 0 with commas between, got '{text}'")
    return found


def shares(option: str, text: str) -> list[float]:
    """Shares in (0, 1] with commas between; `UserError` for anything else."""
    from avlprof.errors import UserError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise UserError(f"{option} must be shares in (0, 1] with commas between, got '{text}'")
    return found


def told(shape: DecoderShape, layers: int | None, device: Any, dtype: Any) -> None:
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
        shown = [{name: row[name] for name in columns if any(r[name] for r in rows)} for row in rows]
        show(shown, form, cells=cells)
    else:
        show(rows, form)
    if out is not None:
        import pandas as pd

        from avlprof.files import write_text

        write_text(out, pd.DataFrame(list(rows)).to_csv(index=False))
        finished([out])
