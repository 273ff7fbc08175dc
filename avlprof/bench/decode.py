"""What decoding steps cost: stock, masked, dense and under a policy, interleaved in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from avlprof.bench.decode_cost import (
    PACKED,
    REFRESH,
    STOCK,
    DecodeCost,
    Seconds,
    cost_of,
    dense_bytes,
    measured,
    stored_share,
)
from avlprof.bench.memory import free_bytes
from avlprof.bench.runners import PromptStates, Runner
from avlprof.bench.shapes import (
    IMAGE,
    DecoderShape,
    prompt,
    random_model,
)
from avlprof.errors import UserError
from avlprof.policy import DENSE, Policy, TextPolicy
from avlprof.watch import SILENT, Watch

ATTENTIONS, OURS = "stock, attentions", "dense"
ALL = "all"  # the method of a row that says why nothing was measured
KEEP_ALL = Policy(name=PACKED, text=TextPolicy(window=1024))


@dataclass(frozen=True)
class DecodeBench:
    """What a decode bench compares, and how often.

    Attributes:
        batches: rows of the batch.
        visions: vision tokens of the prompt; None: the shape's.
        budgets: shares of the vision tokens that stay, in (0, 1].
        layers: decoder layers of the model; None: the shape's.
        rounds: of 8 steps each way.
        attentions: whether to run the stock model with `output_attentions` too.
        captured: whether to run captured steps too; None: on CUDA.

    Raises:
        UserError: a number is out of its range.
    """

    batches: Sequence[int] = (1,)
    visions: Sequence[int] | None = None
    budgets: Sequence[float] = (0.2,)
    layers: int | None = None
    rounds: int = 5
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    attentions: bool = True
    captured: bool | None = None

    def __post_init__(self) -> None:
        counts = [self.rounds, *self.batches, *(self.visions or ())]
        if min(counts) < 1 or not all(0.0 < budget <= 1.0 for budget in self.budgets):
            visions = "the shape's" if self.visions is None else _listed(self.visions)
            raise UserError(
                "a decode bench needs a round, rows, vision tokens and budgets in (0, 1], got "
                f"{self.rounds} rounds, batch {_listed(self.batches)}, vision {visions}, "
                f"budgets {_listed(self.budgets)}"
            )


def run_decode_bench(
    shape: DecoderShape, bench: DecodeBench | None = None, watch: Watch = SILENT
) -> list[DecodeCost]:
    """Time decoding steps behind random prompts on a random model of `shape`, for each batch and length.

    Compared are the stock model with the stock cache, with `output_attentions` (eager), the dense cache
    of this engine (stock attention, preallocated), the same through packed attention, and at every
    budget b of the vision KV:

    - `masked eager b`: a mask over the stock cache hides the rest, in eager attention (keys and values
      repeated for every query head, a float mask, softmax in fp32), as A-VL's authors emulate their core.
    - `masked b`: the same mask in sdpa, which is the better emulation: all keys are still read, but
      transformers 5.23 packs the query heads of a group as rows (earlier versions repeat keys too).
    - `keep b`: eviction.
    - `core b`: the same with a core of half the kept tokens, refreshed every 8th step.

    With `captured` the dense cache and each budget's two policies once more with steps that are
    captured and replayed (see `avlprof.runtime.captured`).

    All caches hold the same random keys and values (see `PromptStates`). A round takes 8 steps each
    way, then 8 more with the attention timed by itself; the ways take turns at every step, and each
    round begins with another. A stock cache goes back to the prompt after each step, so all of them
    share one. A batch and length whose caches do not fit into memory gives one row, method `all`, with
    a note.

    Args:
        watch: its phase `bench decode` counts rounds, of each batch and length anew.

    Raises:
        UserError: no batch and length fits into memory.
    """
    bench = bench or DecodeBench()
    model = random_model(shape, layers=bench.layers, dtype=bench.dtype, device=bench.device)
    captured = model.device.type == "cuda" if bench.captured is None else bench.captured
    costs = []
    for batch in bench.batches:
        for vision in (shape.vision_tokens,) if bench.visions is None else bench.visions:
            runners = list(_runners(model, shape, batch, vision, bench.budgets))
            if captured:
                runners += [runner.replaying() for runner in runners if runner.policy is not None]
            if not bench.attentions:
                runners = [runner for runner in runners if not runner.attentions]
            costs += _cell(shape, model, runners, bench.rounds, watch)
    if all(cost.note for cost in costs):
        raise UserError(f"{costs[0].note}; give fewer layers, a smaller batch or fewer vision tokens")
    return costs


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _cell(
    shape: DecoderShape, model: PreTrainedModel, ways: list[Runner], rounds: int, watch: Watch
) -> list[DecodeCost]:
    """The costs of some ways at one batch and one number of vision tokens."""
    runners = {runner.name: runner for runner in ways}
    stock = runners[STOCK]
    obstacle = _obstacle(model, shape, ways)
    if obstacle:
        return [cost_of(shape, model, stock, ALL, note=obstacle)]
    states = PromptStates.of(model, stock.inputs["input_ids"].shape[1])
    for runner in ways:
        if runner.policy is None and runner is not stock:
            runner.filled_as(stock)
        else:
            runner.fill(states)
    step: Seconds = {name: [] for name in runners}
    attention: Seconds = {name: [] for name in runners}
    for number in range(rounds + 1):
        first = number % len(ways)
        order = ways[first:] + ways[:first]
        taken = _round(order, Runner.steps), _round(order, Runner.attention_steps)
        if number > 0:  # the first round warms up
            for seconds, round_ in zip((step, attention), taken, strict=True):
                for name, own in round_.items():
                    seconds[name].append(own)
        watch.phase("bench decode", number + 1, rounds + 1)
    return [measured(shape, model, runner, stock, step, attention) for runner in ways]


def _round(order: list[Runner], take: Callable[[Runner, int], list[float]]) -> dict[str, list[float]]:
    """Seconds of each step of a round by way; the ways take turns."""
    seconds: dict[str, list[float]] = {runner.name: [] for runner in order}
    for _ in range(REFRESH):
        for runner in order:
            seconds[runner.name] += take(runner, 1)
            runner.rewind()
    return seconds


def _runners(
    model: PreTrainedModel, shape: DecoderShape, batch: int, vision: int, budgets: Sequence[float]
) -> Iterator[Runner]:
    inputs = prompt(model, shape, vision=vision)
    columns = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))
    drawn = columns[order.to(columns.device)]
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
    dense = dense_bytes(model, shape, runners[0])
    caches = dense + sum(int(dense * stored_share(runner)) for runner in runners if runner.policy is not None)
    copies = dense + 2 * dense // layers * (shape.heads // shape.kv_heads)  # of a stock step
    if free is None or caches + copies < 0.8 * free:
        return ""
    return f"left out: its caches take {(caches + copies) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
