"""What decoding steps cost: stock, masked, dense and under a policy, interleaved in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from avlprof.errors import UserError
from avlprof.evaluation.bench.memory import free_bytes
from avlprof.evaluation.bench.runners import Runner
from avlprof.evaluation.bench.shapes import IMAGE, DecoderShape, prompt, random_model
from avlprof.evaluation.bench.trace import median_interval
from avlprof.policy import DENSE, Policy, PromptShape, TextPolicy, read_share

REFRESH = 8
STOCK, ATTENTIONS, OURS, PACKED = "stock", "stock, attentions", "dense", "dense, packed"
KEEP_ALL = Policy(name=PACKED, text=TextPolicy(window=1024))


@dataclass(frozen=True)
class DecodeCost:
    """One way to take the decoding steps of one prompt.

    `step_ms` is the median over rounds of a step's mean milliseconds, `attention_ms` of its part in
    cache and attention, all layers together. `speedup` is the stock step's time over this one's in the
    same round, with its 95% interval, `attention_speedup` that of the packed dense cache's attention
    over this one's. `cap` is what reading fewer bytes could give a step at most: bytes of weights
    and KV read by a dense step over those read here. `refresh_overhead` is the attention time of
    a whole refresh period over what its bytes ask for, by the time that an ordinary step takes for
    its own (1.0: no overhead). `kv_bytes` is the storage behind the cache.
    """

    shape: str
    layers: int
    device: str
    dtype: str
    batch: int
    vision: int
    method: str
    budget: float
    step_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    cap: float
    attention_ms: float
    attention_speedup: float
    refresh_overhead: float
    kv_bytes: int
    rounds: int
    note: str = ""


def run_decode_bench(
    shape: DecoderShape,
    *,
    batch: int = 1,
    vision: int | None = None,
    budgets: Sequence[float] = (0.2,),
    layers: int | None = None,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attentions: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[DecodeCost]:
    """Time decoding steps behind a random prompt on a random model of `shape`.

    Compared are the stock model with the stock cache, with `output_attentions` (eager), the dense cache of
    this engine (stock attention, preallocated), the same through packed attention, and at every
    budget b of the vision KV: a mask over the stock cache that hides the rest (`masked`), eviction
    (`keep`), and a core of half the kept tokens refreshed every 8th step (`core`). A round takes 8
    steps each way, timed as a whole, and 8 more with the attention timed by itself; rounds begin with
    another method each.

    Args:
        vision: vision tokens of the prompt; None: the shape's.
        budgets: shares of the vision tokens that stay, in (0, 1].
        attentions: whether to run the stock model with `output_attentions` too.
        progress: called with rounds of one method done and their total.

    Raises:
        UserError: a number is out of its range, or the caches do not fit into memory.
    """
    if rounds < 1 or batch < 1 or not all(0.0 < budget <= 1.0 for budget in budgets):
        raise UserError(
            f"a decode bench needs a round, a row and budgets in (0, 1], got {rounds} rounds, batch {batch}, "
            f"budgets {', '.join(f'{b:g}' for b in budgets)}"
        )
    model = random_model(shape, layers=layers, dtype=dtype, device=device)
    runners = _runners(model, shape, batch, shape.vision_tokens if vision is None else vision, budgets)
    if not attentions:
        del runners[ATTENTIONS]
    _check_memory(model, shape, runners)
    step: dict[str, list[float]] = {name: [] for name in runners}
    attention: dict[str, list[list[float]]] = {name: [] for name in runners}
    names = list(runners)
    total = len(names) * (rounds + 1)
    for turn in range(rounds + 1):
        for index, name in enumerate(names[turn % len(names) :] + names[: turn % len(names)]):
            runner = runners[name]
            if turn == 0:
                _fill(runner, runners)
            whole, part = runner.steps(REFRESH), runner.attention_steps(REFRESH)
            if turn > 0:  # the first round warms up
                step[name].append(float(np.mean(whole)))
                attention[name].append(part)
            if progress:
                progress(turn * len(names) + index + 1, total)
    return [_summary(shape, model, runners[name], step, attention) for name in names]


def _runners(
    model: PreTrainedModel, shape: DecoderShape, batch: int, vision: int, budgets: Sequence[float]
) -> dict[str, Runner]:
    inputs = prompt(model, shape, vision=vision)
    places = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    drawn = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).to(places.device)]

    def runner(name: str, **options: object) -> Runner:
        return Runner(name, model, inputs, batch, **options)  # type: ignore[arg-type]

    found = [
        runner(STOCK),
        runner(ATTENTIONS, attentions=True),
        runner(OURS, policy=DENSE),
        runner(PACKED, policy=KEEP_ALL),
    ]
    for b in budgets:
        found.append(runner(f"masked {b:g}", hidden=drawn[int(b * len(drawn)) :]))
        found.append(runner(f"keep {b:g}", policy=Policy(vision_keep=b)))
        core = Policy(vision_keep=b, vision_compute=b / 2, refresh_interval=REFRESH)
        found.append(runner(f"core {b:g}", policy=core))
    return {runner.name: runner for runner in found}


def _fill(runner: Runner, runners: dict[str, Runner]) -> None:
    known = runners[STOCK]
    if runner is not known and runner.policy is None and known.cache is not None:
        known_taken = known.taken
        if known_taken == 0:
            runner.filled_as(known)
            return
    runner.fill()


def _check_memory(model: PreTrainedModel, shape: DecoderShape, runners: dict[str, Runner]) -> None:
    free = free_bytes(model.device)
    need = sum(_dense_bytes(model, shape, runner) * _stored(runner) for runner in runners.values())
    if free is not None and need > 0.8 * free:
        raise UserError(
            f"the caches of this bench take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; give "
            "fewer layers, a smaller batch or fewer vision tokens"
        )


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
    step: dict[str, list[float]],
    attention: dict[str, list[list[float]]],
) -> DecodeCost:
    ids = runner.inputs["input_ids"]
    vision = int((ids == IMAGE).sum())
    ours, stock = np.array(step[runner.name]), np.array(step[STOCK])
    speedup, low, high = median_interval(stock / ours)
    inside = np.array(attention[runner.name])
    packed = np.array(attention[PACKED]).mean(axis=1)
    ordinary = inside[:, : REFRESH - 1].mean(axis=1)
    weights = _weight_bytes(model)
    dense = _dense_bytes(model, shape, runner)
    prompt_shape = PromptShape(1, vision, ids.shape[1] - vision - 1)
    policy = runner.policy or DENSE
    read = dense * read_share(policy, [prompt_shape], 1, REFRESH)
    overhead = float("nan")
    if policy.refresh_interval:
        plain = dense * read_share(
            policy.model_copy(update={"refresh_interval": 0}), [prompt_shape], 1, REFRESH
        )
        overhead = float(np.median(inside.mean(axis=1) / (ordinary * read / plain)))
    return DecodeCost(
        shape=shape.name,
        layers=model.config.get_text_config(decoder=True).num_hidden_layers,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        batch=runner.batch,
        vision=vision,
        method=runner.name,
        budget=_stored(runner) if runner.hidden is None else float(runner.name.split()[1]),
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


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decoding step reads: decoder layers and the head."""
    parts = (model.get_decoder().layers, model.get_output_embeddings())
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
