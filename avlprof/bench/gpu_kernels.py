"""What the kernels of recording and of decoding take by themselves, beside what their work asks for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from avlprof.attention.call import Bounds, StepStates
from avlprof.attention.column_sums import Work
from avlprof.attention.decode import kernels_pay
from avlprof.attention.weights import packed_attention
from avlprof.bench.shapes import DecoderShape
from avlprof.runtime.eviction import CoreSlots
from avlprof.runtime.layout import RowPlan, slot_classes
from avlprof.tracing.batch import BatchRows
from avlprof.tracing.columns import Columns
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.prompt import MeasuredRows

KERNELS = "kernels"
_LAUNCH_US = 5.0  # of a kernel that the device waits for
_OPERATIONS = 790e12  # bf16 products a second of an H100
_BEYOND_CACHES = 1 << 28  # bytes of keys and values that are read in turn
_FREE = 32  # slots that a mask hides
_TEXT = 128  # tokens beside those that are stored in 4 bits


@dataclass(frozen=True)
class GpuCost:
    """One number: `value` in `unit` of `measure` in `case`, its `aim` where there is one (as text)."""

    section: str
    case: str
    measure: str
    value: float
    unit: str
    aim: str = ""


class Machine(NamedTuple):
    """A device, the type that it computes in, and the bytes that it reads and writes a second."""

    device: torch.device
    dtype: torch.dtype
    ceiling: float

    def microseconds(self, work: Work, launches: int = 1) -> float:
        """What work should take: its bytes or its products, and the launches."""
        return max(work.bytes / self.ceiling, work.operations / _OPERATIONS) * 1e6 + _LAUNCH_US * launches


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of the fastest of some large copies on a device."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [elapsed(device, lambda: target.copy_(source)) for _ in range(6)]
    return 2 * size / min(seconds)


def elapsed(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
    """Seconds of `work`, by the device's own clock: a mean of some runs one behind the other."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(times):
        work()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1000 / times


def recording_kernels(shape: DecoderShape, tokens: int, machine: Machine) -> Iterator[GpuCost]:
    """Of a prompt of so many tokens, one layer."""
    from avlprof.tracing.triton_rows import PromptRows, RowKernels

    for rows in ("default", "all"):
        plan = _plan(shape, tokens, RecordOptions(rows=rows), machine.device)
        query, key = (
            torch.randn(1, heads, tokens, shape.head_dim, device=machine.device).to(machine.dtype)
            for heads in (shape.heads, shape.kv_heads)
        )
        call = PromptRows(query, key, shape.head_dim**-0.5, None, None, True, None)
        kernels, case = RowKernels(call, plan), f"{shape.name}, {tokens} tokens, {rows} rows"
        for name, work, cost in kernels.parts():
            work()
            seconds = min(elapsed(machine.device, work, 5) for _ in range(3))
            expected = machine.microseconds(cost)
            yield GpuCost(KERNELS, case, f"{name} (predicted {expected:.0f})", 1e6 * seconds, "us")
        whole = min(elapsed(machine.device, kernels.run, 5) for _ in range(3))
        yield GpuCost(
            KERNELS, case, "all of a layer", 1e6 * whole, "us", "<= 145" if rows == "default" else ""
        )


def decoding_kernels(shape: DecoderShape, batch: int, vision: int, machine: Machine) -> Iterator[GpuCost]:
    """Of one layer's step: attention by kernels and by stock, the last slots being free, and a refresh."""
    from avlprof.attention.triton_decode import DecodeKernels

    layers = _layers(shape, batch, vision + shape.text_tokens + 1, machine)
    case = f"{shape.name}, batch {batch}, {vision + shape.text_tokens + 1} tokens"
    plain, weighing = DecodeKernels(layers[0], 0), DecodeKernels(layers[0], 1)
    length = layers[0].key.shape[2]
    chosen = kernels_pay(batch * shape.kv_heads, length, True, machine.dtype)
    expected = machine.microseconds(plain.work, 1 if plain.alone else 2)
    attend = _each(layers, lambda states: DecodeKernels(states, 0).run(), machine)
    yield GpuCost(
        KERNELS, case, f"decode (predicted {expected:.0f})", attend, "us", f"<= {1.25 * expected:.0f}"
    )
    stock = _each(layers, _stock, machine)
    yield GpuCost(KERNELS, case, "stock attention with a mask", stock, "us")
    aim = "> 1.15" if chosen else "<= 1.15"
    yield GpuCost(KERNELS, case, f"stock / decode (kernels {'serve' if chosen else 'do not serve'})",
                  stock / attend, "", aim)  # fmt: skip
    expected = machine.microseconds(weighing.work, 2)
    weigh = _each(layers, lambda states: DecodeKernels(states, 1).run(), machine)
    yield GpuCost(KERNELS, case, f"decode and weigh (predicted {expected:.0f})", weigh, "us")
    low = _in_4_bits(shape, batch, vision, machine)
    short = layers[0]._replace(
        key=layers[0].key[:, :, :_TEXT], value=layers[0].key[:, :, :_TEXT], bounds=None
    )
    coded = DecodeKernels(short, 0, low)
    expected = machine.microseconds(coded.work, 2)
    taken = min(elapsed(machine.device, coded.run, 8) for _ in range(3))
    yield GpuCost(KERNELS, case, f"decode, vision in 4 bits (predicted {expected:.0f})", 1e6 * taken, "us")
    refresh, work = _refresh(layers[0], vision, machine)
    expected = machine.microseconds(work, 2)
    taken = min(elapsed(machine.device, refresh, 8) for _ in range(3))
    yield GpuCost(KERNELS, case, f"choose and exchange (predicted {expected:.0f})", 1e6 * taken, "us")


def eviction_kernels(shape: DecoderShape, tokens: int, machine: Machine) -> Iterator[GpuCost]:
    """Of one layer's prompt, a fifth of whose vision tokens stay: their order, and the move."""
    from avlprof.runtime.triton_layout import prompt_order, taken_slots

    vision = tokens - shape.text_tokens - 1
    plan = RowPlan(1, vision // 5, vision // 5, shape.text_tokens, 0, None)
    codes = _codes(shape, tokens)[None].to(machine.device)
    scores = torch.rand(1, 1, tokens, device=machine.device)
    lengths = plan.system + plan.vision, plan.text
    width = sum(lengths)
    ordered = partial(prompt_order, scores, codes, [plan], [shape.text_tokens], lengths)
    key = torch.randn(1, shape.kv_heads, tokens, shape.head_dim, device=machine.device).to(machine.dtype)
    positions = torch.arange(tokens, device=machine.device)[None, None]
    take = partial(taken_slots, key, key, positions, ordered(), _FREE)
    moved = 4.0 * shape.kv_heads * width * shape.head_dim * machine.dtype.itemsize  # both, read and written
    case = f"{shape.name}, {tokens} tokens, a fifth kept"
    for name, run, work in (
        ("order of a prompt", ordered, Work(4.0 * tokens + 8 * width, 0)),
        ("take its tokens", take, Work(moved, 0)),
    ):
        run()
        taken = min(elapsed(machine.device, run, 8) for _ in range(3))
        expected = machine.microseconds(work)
        yield GpuCost(KERNELS, case, f"{name} (predicted {expected:.0f})", 1e6 * taken, "us")


def _layers(shape: DecoderShape, batch: int, length: int, machine: Machine) -> list[StepStates]:
    """Steps of several layers, more than caches hold, whose last slots are free."""
    bytes_each = 2 * batch * shape.kv_heads * (length + _FREE) * shape.head_dim * machine.dtype.itemsize
    query = torch.randn(batch, shape.heads, 1, shape.head_dim, device=machine.device).to(machine.dtype)
    column = torch.arange(length + _FREE, device=machine.device)
    mask = (column < length).expand(batch, 1, 1, -1).contiguous()
    edge = torch.full((batch,), length - 1, device=machine.device)
    size = (batch, shape.kv_heads, length + _FREE, shape.head_dim)
    layers = []
    for _ in range(max(math.ceil(_BEYOND_CACHES / bytes_each), 1)):
        key, value = (torch.randn(size, device=machine.device, dtype=machine.dtype) for _ in range(2))
        bounds = Bounds(torch.zeros_like(edge), edge, 0)
        layers.append(StepStates(query, key, value, shape.head_dim**-0.5, mask=mask, bounds=bounds))
    return layers


def _each(layers: list[StepStates], attend: Callable[[StepStates], object], machine: Machine) -> float:
    """Microseconds of one of the layers, attended to one behind the other."""

    def all_layers() -> None:
        for states in layers:
            attend(states)

    all_layers()
    return 1e6 * min(elapsed(machine.device, all_layers, 3) for _ in range(3)) / len(layers)


def _stock(states: StepStates) -> Tensor:
    assert states.value is not None
    return packed_attention(states.query, states.key, states.value, states.scaling, states.mask)


class _Few(NamedTuple):
    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int


class _Low(NamedTuple):
    key: _Few
    value: _Few
    firsts: Tensor


def _in_4_bits(shape: DecoderShape, batch: int, count: int, machine: Machine) -> _Low:
    """Random codes of a layer's vision tokens, in groups of 32 channels or less."""
    groups = max(shape.head_dim // 32, 1)

    def few() -> _Few:
        size = (batch, shape.kv_heads, count)
        codes = torch.randint(0, 256, (*size, shape.head_dim // 2), device=machine.device, dtype=torch.uint8)
        scale, offset = (
            torch.rand((*size, groups), device=machine.device, dtype=torch.float16) for _ in range(2)
        )
        return _Few(codes, scale, offset, 4)

    return _Low(few(), few(), torch.zeros(batch, dtype=torch.long, device=machine.device))


def _refresh(states: StepStates, vision: int, machine: Machine) -> tuple[Callable[[], None], Work]:
    """A choice of a tenth of the vision tokens by random scores, and its exchange, of one layer."""
    from avlprof.runtime.triton_exchange import triton_refresh

    assert states.value is not None
    batch, heads, length, size = states.key.shape
    plans = [RowPlan(1, vision, vision // 10, 0, 0, None)] * batch
    left = vision + 1
    core = CoreSlots.of(plans, slot_classes(plans, [0] * batch, left, left, machine.device))
    positions = torch.arange(length, device=machine.device).expand(batch, 1, -1).contiguous()
    scores = torch.rand(batch, 1, left, device=machine.device)  # of slots: each time the same ones change
    changed = int((core.best(scores, positions[..., :left], 1) & ~core.core).sum())
    moved = 4 * changed * heads * 2 * size * states.key.element_size()  # two slots, read and written
    buffers = states.key, states.value, positions
    work = Work(4.0 * scores.numel() + moved, 0)
    return partial(triton_refresh, buffers, scores, 0, core.edges, core.exchanges), work


def _plan(shape: DecoderShape, tokens: int, options: RecordOptions, device: torch.device) -> BatchRows:
    """The measured rows of a prompt of the shape's text behind vision tokens."""
    plan = MeasuredRows(Columns(_codes(shape, tokens), device, options))
    return BatchRows.of([plan], torch.ones(1, tokens, dtype=torch.bool), device)


def _codes(shape: DecoderShape, tokens: int) -> Tensor:
    """Modality codes of one system token, vision tokens, and the shape's text."""
    codes = torch.ones(tokens, dtype=torch.int8)
    codes[0], codes[-shape.text_tokens :] = 0, 2
    return codes
