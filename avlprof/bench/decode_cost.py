"""What was measured of decoding steps, as one row a method: seconds, bytes and the cap on speed-up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from avlprof.bench.runners import Runner
from avlprof.bench.shapes import IMAGE, DecoderShape
from avlprof.bench.trace import median_interval
from avlprof.policy import DENSE, PromptShape, read_share

REFRESH = 8  # steps of a refresh period
STOCK, PACKED = "stock", "dense, packed"  # what speed-ups are over: whole steps, and attention
NAN = float("nan")
Seconds = dict[str, list[list[float]]]
"""Of every step of each round, by the name of the way."""


@dataclass(frozen=True)
class DecodeCost:
    """One way to take the decoding steps of one prompt.

    `step_ms` is the median over rounds of a step's milliseconds, `attention_ms` of its part in
    cache and attention, all layers together, at an ordinary step. `speedup` is the stock step's time over
    this one's in the same round, with its 95% interval, `attention_speedup` that of the packed dense
    cache's attention over this one's. `cap` is what reading fewer bytes could give a step at most: bytes
    of weights and KV read by a dense step over those read here. `refresh_overhead` is the attention
    time of a whole refresh period over what its bytes ask for, by the time that an ordinary step takes
    for its own (1.0: no overhead). `kv_bytes` is the storage behind the cache. Numbers are NaN where
    `note` says why there are none.
    """

    shape: str
    layers: int
    device: str
    dtype: str
    batch: int
    vision: int
    method: str
    budget: float = NAN
    step_ms: float = NAN
    speedup: float = NAN
    speedup_low: float = NAN
    speedup_high: float = NAN
    cap: float = NAN
    attention_ms: float = NAN
    attention_speedup: float = NAN
    refresh_overhead: float = NAN
    kv_bytes: int | None = None
    rounds: int = 0
    note: str = ""


def stored_share(runner: Runner) -> float:
    """Share of the vision KV that a runner's cache holds."""
    return max(runner.policy.keep(1)) if runner.policy is not None else 1.0


def dense_bytes(model: PreTrainedModel, shape: DecoderShape, runner: Runner) -> int:
    """KV bytes that a dense step reads of the prompt, all layers and rows."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    length = runner.inputs["input_ids"].shape[1]
    return int(2 * layers * shape.kv_heads * shape.head_dim * length * runner.batch * model.dtype.itemsize)


def measured(
    shape: DecoderShape,
    model: PreTrainedModel,
    runner: Runner,
    stock: Runner,
    step: Seconds,
    attention: Seconds,
) -> DecodeCost:
    """What the seconds of all rounds say of one runner; `step` and `attention` are those of all, by name."""
    ids = runner.inputs["input_ids"]
    vision = int((ids == IMAGE).sum())
    policy = runner.policy or DENSE
    period = bool(policy.refresh_interval)
    ours, others = _mean_step(step[runner.name], period), _mean_step(step[stock.name], False)
    speedup, low, high = median_interval(others / ours)
    inside = np.array(attention[runner.name])
    ordinary, packed = _ordinary(inside), _ordinary(np.array(attention[PACKED]))
    weights = weight_bytes(model)
    dense = dense_bytes(model, shape, runner)
    row = PromptShape(1, vision, ids.shape[1] - vision - 1)
    read = dense * read_share(policy, [row], 1, REFRESH)
    overhead = NAN
    if period:
        alone = policy.model_copy(update={"refresh_interval": 0})
        plain = dense * read_share(alone, [row], 1, REFRESH)
        usual = float(np.median(inside[:, :-1]))
        took = (REFRESH - 1) * usual + float(np.median(inside[:, -1]))
        overhead = took / (REFRESH * usual * read / plain)
    return cost_of(
        shape,
        model,
        runner,
        runner.name,
        budget=stored_share(runner) if runner.hidden is None else float(runner.name.split()[-1]),
        step_ms=1000 * float(np.median(ours)),
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        cap=(weights + dense) / (weights + read),
        attention_ms=1000 * float(np.median(ordinary)),
        attention_speedup=float(np.median(packed / ordinary)),
        refresh_overhead=overhead,
        kv_bytes=runner.kv_bytes,
        rounds=len(ours),
    )


def cost_of(
    shape: DecoderShape, model: PreTrainedModel, runner: Runner, method: str, **numbers: object
) -> DecodeCost:
    """A row of the table."""
    return DecodeCost(
        shape=shape.name,
        layers=model.config.get_text_config(decoder=True).num_hidden_layers,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        batch=runner.batch,
        vision=int((runner.inputs["input_ids"] == IMAGE).sum()),
        method=method,
        **numbers,  # type: ignore[arg-type]
    )


def _mean_step(rounds: list[list[float]], period: bool) -> NDArray[np.float64]:
    """Seconds of a step in each round: the median, or with a `period` the mean of its kinds of steps."""
    times = np.array(rounds)
    if not period:
        return np.asarray(np.median(times, axis=1))
    return np.asarray(((REFRESH - 1) * _ordinary(times) + times[:, -1]) / REFRESH)


def _ordinary(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median over a round's steps before the refresh."""
    return np.asarray(np.median(times[:, : REFRESH - 1], axis=1))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decoding step reads: decoder layers and the head."""
    parts = (model.get_decoder().layers, model.get_output_embeddings())
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
