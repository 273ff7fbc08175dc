"""`avlprof bench`: what recording, decoding and scoring cost, as ratios measured side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlprof.cli import _options as options
from avlprof.cli._bench_options import (
    LayersOption,
    RoundsOption,
    SaveOption,
    ShapeOption,
    SizesOption,
    ThreadsOption,
    counts,
    describe,
    device_and_dtype,
    print_costs,
    shape_of,
)
from avlprof.cli._output import Format, FormatOption, finished, percent, size
from avlprof.cli._progress import bars
from avlprof.files import check_output, write_text
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(
    help="Time recording, decoding and scoring: ratios, measured in turns in one process.",
    no_args_is_help=True,
    add_completion=False,
)


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
    sizes: SizesOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    threads: ThreadsOption = None,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Prefill alone, prefill while tracing, and eager attention that hands out its weights."""
    from avlprof.bench.trace import METHODS, run_trace_bench

    check_output(out)
    chosen = shape_of(shape, sizes)
    where, kind = device_and_dtype(device, dtype, threads)
    with bars() as watch:
        costs = run_trace_bench(
            chosen,
            counts("--tokens", tokens),
            layers=layers,
            rounds=rounds,
            device=where,
            dtype=kind,
            methods=METHODS if eager else METHODS[:-1],
            watch=watch,
        )
    describe(chosen, layers, where, kind)
    rows = [asdict(cost) for cost in costs]
    columns = ["tokens", "method", "seconds", "ratio", "ratio_low", "ratio_high", "extra_bytes", "note"]
    print_costs(rows, columns, form, out, {"extra_bytes": size})


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
    captured: Annotated[
        bool | None,
        typer.Option(
            "--captured/--no-captured",
            help="Measure captured steps (CUDA graphs) as well; on CUDA unless told.",
            show_default=False,
        ),
    ] = None,
    sizes: SizesOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    threads: ThreadsOption = None,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Decoding steps of the stock model, of a mask, of the dense cache and under policies."""
    from avlprof.bench.decode import DecodeBench, run_decode_bench

    check_output(out)
    chosen = shape_of(shape, sizes)
    where, kind = device_and_dtype(device, dtype, threads)
    bench = DecodeBench(
        batches=counts("--batch", batch),
        visions=None if vision is None else counts("--vision", vision),
        budgets=options.parse_shares("--budget", budget),
        layers=layers,
        rounds=rounds,
        device=where,
        dtype=kind,
        attentions=attentions,
        captured=captured,
    )
    with bars() as watch:
        costs = run_decode_bench(chosen, bench, watch)
    rows = [asdict(cost) for cost in costs]
    describe(chosen, layers, where, kind)
    columns = ["batch", "vision", "method", "step_ms", "speedup", "speedup_low", "speedup_high", "cap"]
    columns += ["attention_ms", "attention_speedup", "refresh_overhead", "kv_bytes", "note"]
    print_costs(rows, columns, form, out, {"kv_bytes": size})


@app.command()
@options.model_options
@options.task_options
def tune(
    spec: ModelSpec,
    source: TaskSpec,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples that a trial is judged on.")] = 64,
    trials: Annotated[int, typer.Option("--trials", help="Policies judged in all.")] = 16,
    batch: Annotated[int, typer.Option("--batch-size", min=1, help="Samples generated at a time.")] = 32,
    workers: Annotated[
        int,
        typer.Option("--workers", min=1, help="Processes that score side by side as well, one thread each."),
    ] = 1,
    single: Annotated[bool, typer.Option("--single/--no-single", help="Generate at batch 1 as well.")] = True,
    threads: ThreadsOption = None,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Trials of a search: one forced forward against generating anew for every policy and sample."""
    from avlprof.bench.side_by_side import run_side_by_side
    from avlprof.bench.tune import TuneBench, run_tune_bench
    from avlprof.models import load_model

    check_output(out)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    task = source.load()
    task.samples("search", samples)
    loaded = load_model(spec)
    bench = TuneBench(samples, trials, batch, max_new_tokens=source.max_new_tokens, single=single)
    with bars() as watch:
        costs = run_tune_bench(loaded, task, bench, watch)
        if workers > 1:
            costs += run_side_by_side(spec, source, bench, workers, watch)
    rows = [asdict(cost) for cost in costs]
    columns = ["method", "trial_s", "cpu_s", "per_hour", "per_hour_low", "per_hour_high"]
    columns += ["speedup", "speedup_low", "speedup_high", "preparation_s", "break_even"]
    print_costs(rows, columns, form, out, dict.fromkeys(columns[3:6], "{:,.0f}".format))


@app.command()
def prefill(
    shape: ShapeOption = "llava-1.5-7b",
    vision: Annotated[str | None, typer.Option("--vision", help="Vision tokens, such as 576,2880.")] = None,
    keep: Annotated[
        float, typer.Option("--keep", help="Share of the vision tokens that stays, or goes on.")
    ] = 0.25,
    layers: LayersOption = 4,
    rounds: RoundsOption = 3,
    sizes: SizesOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    threads: ThreadsOption = None,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Prompts of the stock model, under eviction, and with vision tokens dropped on the way."""
    from avlprof.bench.prefill import run_prefill_bench

    check_output(out)
    chosen = shape_of(shape, sizes)
    where, kind = device_and_dtype(device, dtype, threads)
    with bars() as watch:
        costs = run_prefill_bench(
            chosen,
            [chosen.vision_tokens] if vision is None else counts("--vision", vision),
            keep=keep,
            layers=layers,
            rounds=rounds,
            device=where,
            dtype=kind,
            watch=watch,
        )
    describe(chosen, layers, where, kind)
    columns = ["tokens", "method", "seconds", "speedup", "speedup_low", "speedup_high", "cap"]
    columns += ["peak_bytes", "kv_bytes"]
    print_costs([asdict(cost) for cost in costs], columns, form, out, {"peak_bytes": size, "kv_bytes": size})


@app.command()
def gpu(
    layers: LayersOption = None,
    rounds: RoundsOption = 4,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="No further part begins after so many.")
    ] = 220.0,
    shapes: Annotated[
        str, typer.Option("--shapes", help="Two shapes, of batch 1 and 8 and of batch 1 and 32.")
    ] = "llava-next-7b,qwen2.5-vl-7b",
    device: Annotated[str, typer.Option("--device", help="A CUDA device, or cpu to try it out.")] = "cuda",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the numbers to this file: .json, .csv or .md.")
    ] = None,
    form: FormatOption = Format.table,
) -> None:
    """All that a GPU can prove in four minutes: recording, decoding, first tokens, kernels."""
    from avlprof.bench.gpu import GpuBench, gpu_markdown, run_gpu_bench

    check_output(out)
    first, _, second = shapes.partition(",")
    chosen = (shape_of(first, None), shape_of(second or first, None))
    small = device == "cpu"
    bench = GpuBench(
        shapes=chosen,
        tokens=(256,) if small else (1024, 3072),
        cells=((0, 1, 64),) if small else GpuBench.cells,
        layers=layers,
        rounds=rounds,
        device=device,
        dtype=device_and_dtype(device, "auto", None)[1],
        seconds=seconds,
    )
    with bars() as watch:
        costs = list(run_gpu_bench(bench, watch))
    describe(chosen[0], layers, device, bench.dtype)
    rows = [asdict(cost) for cost in costs]
    if out is not None and out.suffix == ".md":
        write_text(out, gpu_markdown(costs, device))
        finished([out])
        out = None
    print_costs(rows, ["section", "case", "measure", "value", "unit", "aim"], form, out, {})


@app.command()
def storage(
    workers: Annotated[
        str, typer.Option("--workers", help="How many simulated workers at once, such as 1,8,32.")
    ] = "1,8,32,64",
    url: Annotated[
        str | None,
        typer.Option("--storage", help="PostgreSQL URL; measures it, and Optuna's gRPC proxy before it."),
    ] = None,
    each: Annotated[int, typer.Option("--trials", min=1, help="Trials of a worker.")] = 10,
    sleep: Annotated[float, typer.Option("--seconds", min=0, help="How long a trial sleeps.")] = 1.0,
    out: SaveOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Trials a second that the storage of a study takes, from workers that only sleep."""
    from avlprof.bench.storage import run_storage_bench

    check_output(out)
    with bars() as watch:
        costs = run_storage_bench(counts("--workers", workers), url, each, sleep, watch)
    columns = ["storage", "workers", "trials", "seconds", "per_second", "share", "overhead", "cpu"]
    cells = {"seconds": "{:.2f}".format, "per_second": "{:.1f}".format, "share": percent}
    print_costs([asdict(cost) for cost in costs], columns, form, out, {**cells, "overhead": "{:.3f}".format})
