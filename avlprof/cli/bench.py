"""`avlprof bench`: what recording, decoding and scoring cost, as ratios measured side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli import options as given
from avlprof.cli.output import Cells, Format, FormatOption, finished, note, show, size
from avlprof.cli.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avlprof.evaluation.bench.shapes import DecoderShape

app = typer.Typer(
    help="Time recording, decoding and scoring: ratios, measured in turns in one process.",
    no_args_is_help=True,
)

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


@app.command()
def trace(
    shape: ShapeOption = "llava-1.5-7b",
    tokens: Annotated[
        str, typer.Option("--tokens", help="Prompt lengths, such as 1024,2048,4096.")
    ] = "1024,2048",
    layers: LayersOption = 2,
    rounds: RoundsOption = 5,
    eager: Annotated[
        bool, typer.Option("--eager/--no-eager", help="Measure output_attentions of eager as well.")
    ] = True,
    hidden: HiddenOption = None,
    intermediate: MlpOption = None,
    heads: HeadsOption = None,
    kv_heads: KVHeadsOption = None,
    vocabulary: VocabularyOption = None,
    device: given.DeviceOption = "auto",
    dtype: given.DtypeOption = "auto",
    threads: ThreadsOption = None,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Prefill alone, prefill while tracing, and eager attention that hands out its weights."""
    from avlprof.evaluation.bench.shapes import decoder_shape
    from avlprof.evaluation.bench.trace import METHODS, run_trace_bench

    chosen = decoder_shape(
        shape, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary
    )
    where, kind = _place(device, dtype, threads)
    with progress("bench trace", "prefills") as tell:
        found = run_trace_bench(
            chosen,
            _counts("--tokens", tokens),
            layers=layers,
            rounds=rounds,
            device=where,
            dtype=kind,
            methods=METHODS if eager else METHODS[:-1],
            progress=tell,
        )
    _told(chosen, layers, where, kind)
    rows = [asdict(cost) for cost in found]
    columns = ["tokens", "method", "seconds", "ratio", "ratio_low", "ratio_high", "extra_bytes", "note"]
    _print(rows, columns, form, out, {"extra_bytes": size})


@app.command()
def decode(
    shape: ShapeOption = "llava-1.5-7b",
    batch: Annotated[str, typer.Option("--batch", help="Rows, such as 1,8.")] = "1",
    vision: Annotated[str | None, typer.Option("--vision", help="Vision tokens, such as 576,2880.")] = None,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Shares of the vision KV, such as 0.1,0.2.")
    ] = "0.2",
    layers: LayersOption = 2,
    rounds: RoundsOption = 5,
    attentions: Annotated[
        bool, typer.Option("--attentions/--no-attentions", help="Measure output_attentions of eager as well.")
    ] = True,
    hidden: HiddenOption = None,
    intermediate: MlpOption = None,
    heads: HeadsOption = None,
    kv_heads: KVHeadsOption = None,
    vocabulary: VocabularyOption = None,
    device: given.DeviceOption = "auto",
    dtype: given.DtypeOption = "auto",
    threads: ThreadsOption = None,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Decoding steps of the stock model, of a mask, of the dense cache and under policies."""
    from avlprof.evaluation.bench.decode import run_decode_bench
    from avlprof.evaluation.bench.shapes import decoder_shape

    chosen = decoder_shape(
        shape, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary
    )
    where, kind = _place(device, dtype, threads)
    with progress("bench decode", "rounds") as tell:
        found = run_decode_bench(
            chosen,
            batches=_counts("--batch", batch),
            visions=None if vision is None else _counts("--vision", vision),
            budgets=_shares("--budget", budget),
            layers=layers,
            rounds=rounds,
            device=where,
            dtype=kind,
            attentions=attentions,
            progress=tell,
        )
    rows = [asdict(cost) for cost in found]
    _told(chosen, layers, where, kind)
    columns = ["batch", "vision", "method", "step_ms", "speedup", "speedup_low", "speedup_high", "cap"]
    columns += ["attention_ms", "attention_speedup", "refresh_overhead", "kv_bytes", "note"]
    _print(rows, columns, form, out, {"kv_bytes": size})


@app.command()
def tune(
    model: given.ModelOption = "tiny",
    task: Annotated[
        str, typer.Option("--task", "-t", help="Task name, FILE.jsonl, folder or dataset.")
    ] = "shapes",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples that a trial is judged on.")] = 64,
    trials: Annotated[int, typer.Option("--trials", help="Policies judged in all.")] = 12,
    batch: Annotated[int, typer.Option("--batch-size", min=1, help="Samples generated at a time.")] = 32,
    single: Annotated[bool, typer.Option("--single/--no-single", help="Generate at batch 1 as well.")] = True,
    device: given.DeviceOption = "auto",
    dtype: given.DtypeOption = "auto",
    threads: ThreadsOption = None,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Trials of a search: one forced forward against generating anew for every policy and sample."""
    from avlprof.evaluation.bench.tune import run_tune_bench
    from avlprof.models import load_model
    from avlprof.tasks import load_task

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    loaded = load_model(model, device=device, dtype=dtype)
    with progress("bench tune", "steps") as tell:
        found = run_tune_bench(
            loaded, load_task(task), samples, trials, batch=batch, single=single, progress=tell
        )
    rows = [asdict(cost) for cost in found]
    columns = ["method", "trial_s", "trials_per_minute", "speedup", "speedup_low", "speedup_high"]
    columns += ["preparation_s", "break_even", "answer_tokens"]
    _print(rows, columns, form, out, {})


def _place(device: str, dtype: str, threads: int | None) -> tuple[Any, Any]:
    import torch

    from avlprof.models.placement import resolve_device, resolve_dtype

    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    return where, resolve_dtype(dtype, where, None, hub=True)


def _counts(option: str, text: str) -> list[int]:
    from avlprof.errors import UserError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"{option} must be whole numbers above 0 with commas between, got '{text}'")
    return found


def _shares(option: str, text: str) -> list[float]:
    from avlprof.errors import UserError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise UserError(f"{option} must be shares in (0, 1] with commas between, got '{text}'")
    return found


def _told(shape: DecoderShape, layers: int | None, device: Any, dtype: Any) -> None:
    import platform

    import torch

    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else platform.processor()
    used = f"{layers} of {shape.layers} layers" if layers else f"{shape.layers} layers"
    threads = "" if str(device).startswith("cuda") else f", {torch.get_num_threads()} threads"
    kind = str(dtype).removeprefix("torch.")
    note(f"{shape.name}, {used}, {kind}, {name or 'CPU'}{threads}, torch {torch.__version__}")


def _print(
    rows: Sequence[dict[str, Any]], columns: list[str], form: Format, out: Path | None, cells: Cells
) -> None:
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
