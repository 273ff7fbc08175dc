"""What recording costs: plain, traced and eager prefills, interleaved in one process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.bench.memory import free_bytes, peak_above
from avlprof.bench.shapes import DecoderShape, prompt, random_model
from avlprof.errors import UserError
from avlprof.tracing import RecordOptions, record
from avlprof.watch import SILENT, Watch

METHODS = ("plain", "traced", "traced all rows", "eager")
_EAGER_COPIES = 3  # a layer's scores, their fp32 softmax and its cast, alive at once
_RESAMPLES = 2000


@dataclass(frozen=True)
class TraceCost:
    """One way to run one prompt's prefill.

    `seconds` is the median over rounds. `ratio` is the median over rounds of this method's
    seconds over plain's in the same round, with its 95% bootstrap interval (smallest and largest
    ratio with fewer than 6 rounds). `peak_bytes` is how far tensors rose above what was there,
    cache and activations included; `extra_bytes` is that less plain's, so what lives beside the
    MLP's activations shows and what fits below their peak does not. Numbers are NaN or None
    where `note` says why there are none.
    """

    shape: str
    layers: int
    device: str
    dtype: str
    tokens: int
    method: str
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    peak_bytes: int | None
    extra_bytes: int | None
    rounds: int
    note: str = ""


def run_trace_bench(
    shape: DecoderShape,
    lengths: Sequence[int],
    *,
    layers: int | None = None,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    methods: Sequence[str] = METHODS,
    watch: Watch = SILENT,
) -> list[TraceCost]:
    """Time prefills of random prompts on a random model of `shape`, for every length and method.

    In a round each method runs the same prompt once, and rounds begin with another method each,
    so that drift of the machine meets all alike. A first round warms up and is not timed; it
    gives the peak memory. A traced run is timed from entering the context until its frame and
    scores are in hand. Prompts end in the shape's text tokens; all tokens before, but one, are vision.

    Args:
        lengths: tokens of the prompts.
        layers: decoder layers of the model; None: the shape's.
        methods: which of `METHODS` are timed; `plain` must be one.
        watch: its phase `bench trace` counts prefills.

    Returns:
        One `TraceCost` for each length and method, in this order.

    Raises:
        UserError: a length leaves no vision token, rounds are fewer than 1, or a method is unknown.
    """
    least = shape.text_tokens + 2
    if not lengths or min(lengths) < least:
        raise UserError(
            f"lengths must be at least {least} tokens for shape '{shape.name}', got {list(lengths)}"
        )
    if rounds < 1 or "plain" not in methods or not set(methods) <= set(METHODS):
        raise UserError(
            f"a trace bench needs a round, and plain among methods of {', '.join(METHODS)}; got {rounds} "
            f"rounds and {', '.join(methods)}"
        )
    model = random_model(shape, layers=layers, dtype=dtype, device=device)
    done, total = 0, len(lengths) * len(methods) * (rounds + 1)
    costs = []
    for tokens in lengths:
        inputs = prompt(model, shape, vision=tokens - shape.text_tokens - 1)
        notes = {name: _obstacle(name, model, tokens) for name in methods}
        able = [name for name in methods if not notes[name]]
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        peaks: dict[str, int | None] = dict.fromkeys(methods)
        for turn in range(rounds + 1):
            for name in able[turn % len(able) :] + able[: turn % len(able)]:
                if turn == 0:
                    _prefill(name, model, inputs)  # compiles and allocates what stays
                    peaks[name] = peak_above(model.device, partial(_prefill, name, model, inputs))
                else:
                    seconds[name].append(_timed(name, model, inputs))
                done += 1
                watch.phase("bench trace", done, total)
        done += (len(methods) - len(able)) * (rounds + 1)
        costs += [_summary(shape, model, tokens, name, seconds, peaks, notes[name]) for name in methods]
    return costs


@torch.inference_mode()
def _prefill(method: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    if method == "plain":
        model(**inputs, logits_to_keep=1)
    elif method == "eager":
        with _eager(model):
            model(**inputs, logits_to_keep=1, output_attentions=True)
    else:
        rows = "all" if method == "traced all rows" else "default"
        with record(model, RecordOptions(rows=rows)) as recorder:
            model(**inputs, logits_to_keep=1)
        recorder.records[0].frame()
        recorder.records[0].scores()


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention in the language model, which alone hands out its weights."""
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


def _timed(method: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    started = time.perf_counter()
    _prefill(method, model, inputs)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


def _obstacle(method: str, model: PreTrainedModel, tokens: int) -> str:
    """Why a method is left out; empty if it runs."""
    free = free_bytes(model.device)
    if method != "eager" or free is None:
        return ""
    config = model.config.get_text_config(decoder=True)
    matrix = config.num_attention_heads * tokens**2
    need = matrix * (config.num_hidden_layers * model.dtype.itemsize + _EAGER_COPIES * 4)
    if need < 0.8 * free:
        return ""
    return f"left out: its weights take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _summary(
    shape: DecoderShape,
    model: PreTrainedModel,
    tokens: int,
    method: str,
    seconds: dict[str, list[float]],
    peaks: dict[str, int | None],
    note: str,
) -> TraceCost:
    ratios = np.array(seconds[method]) / np.array(seconds["plain"][: len(seconds[method])])
    ratio, low, high = median_interval(ratios)
    peak, plain = peaks[method], peaks["plain"]
    return TraceCost(
        shape=shape.name,
        layers=model.config.get_text_config(decoder=True).num_hidden_layers,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=tokens,
        method=method,
        seconds=float(np.median(seconds[method])) if seconds[method] else float("nan"),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        peak_bytes=peak,
        extra_bytes=None if peak is None or plain is None else peak - plain,
        rounds=len(ratios),
        note=note,
    )


def median_interval(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float, float]:
    """Median with its 95% bootstrap interval; the extremes with fewer than 6 values, NaN with none."""
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    median = float(np.median(values))
    if len(values) < 6:
        return median, float(values.min()), float(values.max())
    draws = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return median, float(low), float(high)
