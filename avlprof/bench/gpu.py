"""One proof of what avlprof costs on a GPU: recording, decoding, first tokens and kernels, in minutes.

Nothing is downloaded: models have known shapes and random weights. What is timed lies between two
events of the device, without a wait in between; ratios are of ways that took turns.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.bench.decode_cost import dense_bytes, weight_bytes
from avlprof.bench.gpu_kernels import (
    GpuCost,
    Machine,
    copy_bandwidth,
    decoding_kernels,
    elapsed,
    eviction_kernels,
    recording_kernels,
)
from avlprof.bench.runners import PromptStates, Runner
from avlprof.bench.shapes import IMAGE, DecoderShape, decoder_shape, prompt, random_model
from avlprof.bench.trace import METHODS, run_trace_bench
from avlprof.errors import UserError
from avlprof.policy import DENSE, Policy, PromptShape, read_share
from avlprof.runtime.apply import apply
from avlprof.tracing import record
from avlprof.watch import SILENT, Watch

KEEP = Policy(name="keep .2", vision_keep=0.2)
CORE = Policy(name="keep .4, core .1", vision_keep=0.4, vision_compute=0.1, refresh_interval=8)
RECORDING, DECODING, ANSWERS, MEMORY = "recording", "decoding", "answers", "memory"
SECOND_CALL = "second captured call, until it replays"
_STEPS = 24  # three refresh periods


@dataclass(frozen=True)
class GpuBench:
    """What is measured.

    Attributes:
        shapes: of recording, and of decoding with `cells`.
        tokens: prompt lengths of recording and first tokens.
        cells: shape, batch and vision tokens of decoding.
        layers: decoder layers; None: the shapes' own.
        rounds: of recording and of answers, behind one that warms up.
        seconds: after which no further part begins.
    """

    shapes: Sequence[DecoderShape] = (decoder_shape("llava-next-7b"), decoder_shape("qwen2.5-vl-7b"))
    tokens: Sequence[int] = (1024, 3072)
    cells: Sequence[tuple[int, int, int]] = ((0, 1, 2880), (0, 8, 2880), (1, 1, 4096), (1, 32, 8192))
    layers: int | None = None
    rounds: int = 4
    device: torch.device | str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 220.0


def run_gpu_bench(bench: GpuBench, watch: Watch = SILENT) -> Iterator[GpuCost]:
    """Measure part by part, and give each number as it is known.

    Args:
        watch: its phase `bench gpu` counts parts; sentences name what was left out.

    Raises:
        UserError: there is no CUDA device, and the CPU is not asked for by name; fewer than 1 round.
    """
    device = torch.device(bench.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("bench gpu needs a CUDA device, and torch finds none; --device cpu tries it out")
    ceiling = copy_bandwidth(device)
    yield GpuCost(MEMORY, "copy ceiling", "bytes read and written", ceiling / 1e12, "TB/s")
    parts = [("kernels", partial(_kernels, bench, ceiling))]
    for index, shape in enumerate(bench.shapes):
        parts.append((f"{shape.name}, recording", partial(_recording, bench, shape)))
        parts.append((f"{shape.name}, decoding", partial(_decoding, bench, index, ceiling)))
    began = time.monotonic()
    for number, (name, part) in enumerate(parts):
        watch.phase("bench gpu", number, len(parts))
        if time.monotonic() - began > bench.seconds:
            watch.say(f"{name} is left out: {bench.seconds:g} seconds are over")
            continue
        try:
            yield from part()
        except torch.cuda.OutOfMemoryError:
            watch.say(f"{name} does not fit into the device's memory")
        _free(device)
    watch.phase("bench gpu", len(parts), len(parts))


def _kernels(bench: GpuBench, ceiling: float) -> Iterator[GpuCost]:
    """Kernels alone, beside what their bytes and operations ask for."""
    if torch.device(bench.device).type == "cuda":
        machine = Machine(torch.device(bench.device), bench.dtype, ceiling)
        yield from recording_kernels(bench.shapes[0], max(bench.tokens), machine)
        yield from eviction_kernels(bench.shapes[0], max(bench.tokens), machine)
        for index, batch, vision in bench.cells:
            yield from decoding_kernels(bench.shapes[index], batch, vision, machine)


def _recording(bench: GpuBench, shape: DecoderShape) -> Iterator[GpuCost]:
    """Traced over plain prefill, and traced over plain steps."""
    costs = run_trace_bench(
        shape,
        bench.tokens,
        layers=bench.layers,
        rounds=bench.rounds,
        device=bench.device,
        dtype=bench.dtype,
        methods=METHODS,
    )
    aims = {"traced": "<= 1.05", "traced all rows": "<= 1.15"}
    for cost in costs:
        case = f"{shape.name}, {cost.tokens} tokens, {cost.layers} layers"
        if cost.method == "plain":
            yield GpuCost(RECORDING, case, "plain prefill", 1000 * cost.seconds, "ms")
        else:
            aim = aims.get(cost.method, "") if cost.tokens > 2048 else ""
            yield GpuCost(RECORDING, case, f"{cost.method} / plain", cost.ratio, "", aim)
    _free(torch.device(bench.device))
    model = random_model(shape, layers=bench.layers, dtype=bench.dtype, device=bench.device)
    yield from _answers(bench, model, shape)


def _answers(bench: GpuBench, model: PreTrainedModel, shape: DecoderShape) -> Iterator[GpuCost]:
    """What `generate` costs: traced steps, first tokens under a policy, a second call with captured steps."""
    tokens = max(bench.tokens)
    inputs = prompt(model, shape, vision=tokens - shape.text_tokens - 1)
    case = f"{shape.name}, {tokens} tokens"

    def answer(count: int, around: Callable[[], contextlib.AbstractContextManager[object]]) -> float:
        with around(), torch.inference_mode():
            return elapsed(model.device, partial(_generate, model, inputs, count))

    stock: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    ways = {
        "stock": stock,
        "traced": lambda: record(model),
        "keep .2": lambda: apply(model, KEEP),
        "keep .2, captured": lambda: apply(model, KEEP, captured=64),
        "dense, captured": lambda: apply(model, DENSE, captured=64),
    }
    first: dict[str, list[float]] = {name: [] for name in ways}
    longer: dict[str, list[float]] = {name: [] for name in ("stock", "traced")}
    for turn in range(bench.rounds + 1):
        taken = {name: answer(1, around) for name, around in ways.items()}
        steps = {name: answer(33, ways[name]) - answer(1, ways[name]) for name in longer}
        for name in taken if turn else ():  # the first round warms up
            first[name].append(taken[name])
        for name in steps if turn else ():
            longer[name].append(steps[name])
    stock_first = median(first["stock"])
    yield GpuCost(ANSWERS, case, "first token, stock", 1000 * stock_first, "ms")
    for name in list(ways)[2:]:
        yield GpuCost(
            ANSWERS, case, f"first token, {name} / stock", median(first[name]) / stock_first, "", "<= 1.05"
        )
    ratio = median(longer["traced"]) / median(longer["stock"])
    yield GpuCost(ANSWERS, case, "traced / plain steps", ratio, "", "<= 1.05")
    with apply(model, KEEP, captured=64), torch.inference_mode():
        calls = [
            elapsed(model.device, partial(_generate, model, inputs, count)) for count in (4, 20, 4, 20, 1)
        ]
    step = (calls[3] - calls[2]) / 16
    for number, name in ((0, "first captured call, until it replays (compiles)"), (2, SECOND_CALL)):
        extra = calls[number] - calls[4] - 3 * step
        aim = "0" if name == SECOND_CALL else ""
        yield GpuCost(ANSWERS, case, name, 1000 * max(extra, 0.0), "ms", aim)


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> None:
    model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def _decoding(bench: GpuBench, index: int, ceiling: float) -> Iterator[GpuCost]:
    """Steps of whole models against the bytes that they read."""
    shape = bench.shapes[index]
    model = random_model(shape, layers=bench.layers, dtype=bench.dtype, device=bench.device)
    for _, batch, vision in (cell for cell in bench.cells if cell[0] == index):
        inputs = prompt(model, shape, vision=vision)
        states = PromptStates.of(model, inputs["input_ids"].shape[1])
        case = f"{shape.name}, batch {batch}, {inputs['input_ids'].shape[1]} tokens"
        ways = [Runner("stock", model, inputs, batch)]
        ways += [Runner(p.name, model, inputs, batch, p).replaying() for p in (DENSE, KEEP, CORE)]
        ways.append(Runner(KEEP.name, model, inputs, batch, KEEP).replaying(fused=False))
        for runner in ways:
            try:
                yield from _steps(runner, states, shape, case, ceiling)
            except torch.cuda.OutOfMemoryError:
                yield GpuCost(DECODING, case, f"{runner.name}: out of memory", float("nan"), "")
            runner.cache = None
            _free(model.device)


def _steps(
    runner: Runner, states: PromptStates, shape: DecoderShape, case: str, ceiling: float
) -> Iterator[GpuCost]:
    device, policy = runner.model.device, runner.policy
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runner.fill(states)
    runner.event_steps(CORE.refresh_interval)  # captures both kinds of steps
    runner.rewind()
    seconds = runner.event_steps(_STEPS)
    every = CORE.refresh_interval
    refreshes = seconds[every - 1 :: every]
    step = median(value for number, value in enumerate(seconds, start=1) if number % every)
    ids = runner.inputs["input_ids"]
    vision = int((ids == IMAGE).sum())
    row = PromptShape(1, vision, ids.shape[1] - vision - 1)
    dense, weights = dense_bytes(runner.model, shape, runner), weight_bytes(runner.model)
    plain = (policy or DENSE).model_copy(update={"refresh_interval": 0})
    read = weights + dense * read_share(plain, [row], 1, 1)
    bound = read / ceiling
    yield GpuCost(DECODING, case, f"{runner.name}: step", 1000 * step, "ms")
    aim = "<= 1.25" if policy is not None else ""
    yield GpuCost(DECODING, case, f"{runner.name}: step / its bytes", step / bound, "", aim)
    if policy is not None and policy.refresh_interval:
        whole = weights + dense * read_share(Policy(vision_keep=policy.vision_keep), [row], 1, 1)
        yield GpuCost(DECODING, case, f"{runner.name}: refresh / step", median(refreshes) / step, "",
                      f"<= {1.3 * whole / read:.2f}")  # fmt: skip
        yield GpuCost(DECODING, case, f"{runner.name}: mean step", 1000 * sum(seconds) / len(seconds), "ms")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        yield GpuCost(DECODING, case, f"{runner.name}: peak memory", peak, "GiB")


def gpu_markdown(costs: Sequence[GpuCost], device: torch.device | str) -> str:
    """The numbers as a section of a Markdown page."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    lines = [
        f"## {name}, torch {torch.__version__}, {datetime.date.today().isoformat()}",
        "",
        "`avlprof bench gpu`",
        "",
        "| part | case | measure | value | aim |",
        "|---|---|---|---|---|",
    ]
    for cost in costs:
        value = f"{cost.value:.3g} {cost.unit}".strip()
        lines.append(f"| {cost.section} | {cost.case} | {cost.measure} | {value} | {cost.aim} |")
    return "\n".join(lines) + "\n"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
