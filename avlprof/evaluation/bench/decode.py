"""What decoding steps cost: stock, masked, dense and under a policy, interleaved in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from avlprof.errors import UserError
from avlprof.evaluation.bench.memory import free_bytes
from avlprof.evaluation.bench.runners import PromptStates, Runner
from avlprof.evaluation.bench.shapes import IMAGE, DecoderShape, prompt, random_model
from avlprof.evaluation.bench.trace import median_interval
from avlprof.policy import DENSE, Policy, PromptShape, TextPolicy, read_share

REFRESH = 8
STOCK, ATTENTIONS, OURS, PACKED = "stock", "stock, attentions", "dense", "dense, packed"
ALL = "all"  # the method of a row that says why nothing was measured
KEEP_ALL = Policy(name=PACKED, text=TextPolicy(window=1024))
NAN = float("nan")


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


def run_decode_bench(
    shape: DecoderShape,
    *,
    batches: Sequence[int] = (1,),
    visions: Sequence[int] | None = None,
    budgets: Sequence[float] = (0.2,),
    layers: int | None = None,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attentions: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[DecodeCost]:
    """Time decoding steps behind random prompts on a random model of `shape`, for each batch and length.

    Compared are the stock model with the stock cache, with `output_attentions` (eager), the dense cache
    of this engine (stock attention, preallocated), the same through packed attention, and at every
    budget b of the vision KV:

    - `masked b`: a 2D attention mask over the stock cache hides the rest. transformers then repeats
      keys and values for every query head before sdpa reads all of them.
    - `masked eager b`: the same in eager attention (repeated heads, a float mask, softmax in fp32),
      which is how A-VL's authors emulate their core.
    - `keep b`: eviction.
    - `core b`: the same with a core of half the kept tokens, refreshed every 8th step.

    All caches hold the same random keys and values (see `PromptStates`). A round takes 8 steps each
    way, then 8 more with the attention timed by itself; the ways take turns at every step, and each
    round begins with another. A stock cache goes back to the prompt after each step, so all of them
    share one. A batch and length whose caches do not fit into memory gives one row, method `all`, with a note.

    Args:
        batches: rows of the batch.
        visions: vision tokens of the prompt; None: the shape's.
        budgets: shares of the vision tokens that stay, in (0, 1].
        attentions: whether to run the stock model with `output_attentions` too.
        progress: called with rounds of one method done and their total, of each batch and length anew.

    Raises:
        UserError: a number is out of its range, or no batch and length fits into memory.
    """
    visions = (shape.vision_tokens,) if visions is None else visions
    if rounds < 1 or min(*batches, *visions, 1) < 1 or not all(0.0 < budget <= 1.0 for budget in budgets):
        raise UserError(
            "a decode bench needs a round, rows, vision tokens and budgets in (0, 1], got "
            f"{rounds} rounds, batch {_listed(batches)}, vision {_listed(visions)}, "
            f"budgets {_listed(budgets)}"
        )
    model = random_model(shape, layers=layers, dtype=dtype, device=device)
    found = []
    for batch in batches:
        for vision in visions:
            found += _cell(shape, model, batch, vision, budgets, rounds, attentions, progress)
    if all(cost.note for cost in found):
        raise UserError(f"{found[0].note}; give fewer layers, a smaller batch or fewer vision tokens")
    return found


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _cell(
    shape: DecoderShape,
    model: PreTrainedModel,
    batch: int,
    vision: int,
    budgets: Sequence[float],
    rounds: int,
    attentions: bool,
    progress: Callable[[int, int], None] | None,
) -> list[DecodeCost]:
    """The costs at one batch and one number of vision tokens."""
    runners = {runner.name: runner for runner in _runners(model, shape, batch, vision, budgets)}
    if not attentions:
        del runners[ATTENTIONS]
    obstacle = _obstacle(model, shape, list(runners.values()))
    if obstacle:
        return [_cost(shape, model, runners[STOCK], ALL, note=obstacle)]
    states = PromptStates.of(model, runners[STOCK].inputs["input_ids"].shape[1])
    for runner in runners.values():
        if runner.policy is None and runner.name != STOCK:
            runner.filled_as(runners[STOCK])
        else:
            runner.fill(states)
    step: dict[str, list[list[float]]] = {name: [] for name in runners}
    attention: dict[str, list[list[float]]] = {name: [] for name in runners}
    names, total = list(runners), rounds + 1
    for turn in range(total):
        first = turn % len(names)
        order = [runners[name] for name in names[first:] + names[:first]]
        for found, take in ((step, Runner.steps), (attention, Runner.attention_steps)):
            taken: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(REFRESH):
                for runner in order:
                    taken[runner.name] += take(runner, 1)
                    runner.rewind()
            if turn > 0:  # the first round warms up
                for name in names:
                    found[name].append(taken[name])
        if progress:
            progress(turn + 1, total)
    return [_summary(shape, model, runner, runners[STOCK], step, attention) for runner in runners.values()]


def _runners(
    model: PreTrainedModel, shape: DecoderShape, batch: int, vision: int, budgets: Sequence[float]
) -> Iterator[Runner]:
    inputs = prompt(model, shape, vision=vision)
    places = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    drawn = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).to(places.device)]
    yield Runner(STOCK, model, inputs, batch)
    yield Runner(ATTENTIONS, model, inputs, batch, attentions=True)
    yield Runner(OURS, model, inputs, batch, policy=DENSE)
    yield Runner(PACKED, model, inputs, batch, policy=KEEP_ALL)
    for b in budgets:
        hidden = drawn[int(b * len(drawn)) :]
        yield Runner(f"masked {b:g}", model, inputs, batch, hidden=hidden)
        yield Runner(f"masked eager {b:g}", model, inputs, batch, hidden=hidden, eager=True)
        yield Runner(f"keep {b:g}", model, inputs, batch, policy=Policy(vision_keep=b))
        core = Policy(vision_keep=b, vision_compute=b / 2, refresh_interval=REFRESH)
        yield Runner(f"core {b:g}", model, inputs, batch, policy=core)


def _obstacle(model: PreTrainedModel, shape: DecoderShape, runners: list[Runner]) -> str:
    """Why caches do not fit into memory; empty if they do."""
    free = free_bytes(model.device)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    dense = _dense_bytes(model, shape, runners[0])
    held = dense + sum(int(dense * _stored(runner)) for runner in runners if runner.policy is not None)
    copies = dense + 2 * dense // layers * (shape.heads // shape.kv_heads)  # of a stock step
    if free is None or held + copies < 0.8 * free:
        return ""
    return f"left out: its caches take {(held + copies) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _stored(runner: Runner) -> float:
    return max(runner.policy.keep(1)) if runner.policy is not None else 1.0


def _dense_bytes(model: PreTrainedModel, shape: DecoderShape, runner: Runner) -> int:
    """KV bytes that a dense step reads of the prompt, all layers and rows."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    length = runner.inputs["input_ids"].shape[1]
    return int(2 * layers * shape.kv_heads * shape.head_dim * length * runner.batch * model.dtype.itemsize)


def _summary(
    shape: DecoderShape,
    model: PreTrainedModel,
    runner: Runner,
    stock: Runner,
    step: dict[str, list[list[float]]],
    attention: dict[str, list[list[float]]],
) -> DecodeCost:
    ids = runner.inputs["input_ids"]
    vision = int((ids == IMAGE).sum())
    policy = runner.policy or DENSE
    period = bool(policy.refresh_interval)
    ours, others = _mean_step(step[runner.name], period), _mean_step(step[stock.name], False)
    speedup, low, high = median_interval(others / ours)
    inside = np.array(attention[runner.name])
    ordinary, packed = _ordinary(inside), _ordinary(np.array(attention[PACKED]))
    weights = _weight_bytes(model)
    dense = _dense_bytes(model, shape, runner)
    shown = PromptShape(1, vision, ids.shape[1] - vision - 1)
    read = dense * read_share(policy, [shown], 1, REFRESH)
    overhead = NAN
    if period:
        alone = policy.model_copy(update={"refresh_interval": 0})
        plain = dense * read_share(alone, [shown], 1, REFRESH)
        usual = float(np.median(inside[:, :-1]))
        took = (REFRESH - 1) * usual + float(np.median(inside[:, -1]))
        overhead = took / (REFRESH * usual * read / plain)
    return _cost(
        shape,
        model,
        runner,
        runner.name,
        budget=_stored(runner) if runner.hidden is None else float(runner.name.split()[-1]),
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


def _cost(
    shape: DecoderShape, model: PreTrainedModel, runner: Runner, method: str, **found: object
) -> DecodeCost:
    return DecodeCost(
        shape=shape.name,
        layers=model.config.get_text_config(decoder=True).num_hidden_layers,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        batch=runner.batch,
        vision=int((runner.inputs["input_ids"] == IMAGE).sum()),
        method=method,
        **found,  # type: ignore[arg-type]
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


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decoding step reads: decoder layers and the head."""
    parts = (model.get_decoder().layers, model.get_output_embeddings())
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
