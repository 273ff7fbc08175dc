"""What a trial of a search costs: forced scoring against generating anew, interleaved in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from avlprof.bench.trace import median_interval
from avlprof.errors import UserError
from avlprof.evaluation.answers import generate_tokens, running
from avlprof.models import LoadedModel
from avlprof.policy import Policy, ScorerSpec
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Sample, Task
from avlprof.watch import SILENT, Watch

T = TypeVar("T")
Way = Callable[[list[Policy]], int]
"""Judges policies, and says how many it judged."""

SCORERS = ("last_query", "instruction")
REFRESHES = (0, 2, 4, 8)
SINGLE = "generate, batch 1"


@dataclass(frozen=True)
class TrialCost:
    """One way to judge a policy on all samples.

    `trial_s` is the median over rounds of the seconds that a policy takes; `trials_per_minute` follows
    from it. `speedup` is the time of `generate, batch B` over this one's in the same round, with its
    95% interval. `preparation_s` is paid once for all trials: dense answers and prefilled prompts; for
    the naive ways the encoding of prompts and pictures, which their trials are thus spared.
    `break_even` is the number of trials from which on, preparation included, this way is quicker
    than `generate, batch B`; None where it never is.
    """

    method: str
    samples: int
    batch: int
    answer_tokens: float
    device: str
    rounds: int
    trial_s: float
    trials_per_minute: float
    speedup: float
    speedup_low: float
    speedup_high: float
    preparation_s: float
    break_even: int | None


@dataclass(frozen=True)
class TuneBench:
    """What is judged, and how it is taken together.

    Attributes:
        samples: of the search split, that every policy is judged on.
        trials: policies in all, a multiple of `together` after rounding up.
        batch: samples that are generated at a time.
        together: policies of a round.
        budget: mean share of vision tokens that a policy keeps; half of it is its core.
        max_new_tokens: the longest answer; the task's when None.
        single: whether to generate at batch 1 too.
        seed: of the policies.

    Raises:
        UserError: a number is out of its range.
    """

    samples: int = 64
    trials: int = 12
    batch: int = 32
    together: int = 4
    budget: float = 0.3
    max_new_tokens: int | None = None
    single: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.samples, self.trials, self.batch, self.together)
        if min(counts) < 1 or not 0.0 < self.budget <= 1.0:
            raise UserError(
                "a tune bench needs samples, trials, a batch and policies together of 1 or more and a "
                f"budget in (0, 1], got {', '.join(map(str, counts))} and {self.budget:g}"
            )

    @property
    def rounds(self) -> int:
        """How often every way has its turn."""
        return -(-self.trials // self.together)


def run_tune_bench(
    loaded: LoadedModel, task: Task, bench: TuneBench, watch: Watch = SILENT
) -> list[TrialCost]:
    """Judge the same random policies by forced scoring and by real generation, in turn.

    A round judges `together` policies: forced one by one, forced in one call, generated in batches
    of `batch`, and the first of them generated at batch 1 (its time stands for the round's). Rounds
    begin with another way each. Nothing is judged by a metric, so the naive way is timed in its favour.

    Args:
        watch: told how many ways were timed, as the phase `bench tune`.

    Raises:
        UserError: no dense answer has a second token.
    """
    samples = task.samples("search", bench.samples)
    limit = bench.max_new_tokens or task.max_new_tokens
    device = loaded.model.device
    policies = trial_policies(loaded.adapter.layers, bench.rounds * bench.together, bench.budget, bench.seed)
    specs = [ScorerSpec(name=name) for name in SCORERS]
    prepared, forced = _timed(
        device,
        lambda: ForcedSet.prepare(
            loaded, samples, max_new_tokens=limit, batch_size=bench.batch, scorers=specs
        ),
    )
    if not forced.answer_tokens:
        raise UserError("every dense answer ends at its first token; choose a task with longer answers")
    prepared += _timed(device, lambda: forced.score(policies[0]))[0]  # dense rows, once for all trials
    encoded, batches = _timed(device, lambda: _encoded(loaded, samples, bench.batch))
    naive = f"generate, batch {bench.batch}"
    ways: dict[str, Way] = {
        "forced": lambda part: len([forced.score(policy) for policy in part]),
        f"forced, {bench.together} together": lambda part: len(forced.score_many(part)),
        naive: lambda part: _generate(loaded, batches, part, limit),
    }
    spent = dict.fromkeys(ways, encoded) | dict.fromkeys(list(ways)[:2], prepared)
    if bench.single:
        alone, singles = _timed(device, lambda: _encoded(loaded, samples, 1))
        ways[SINGLE] = lambda part: _generate(loaded, singles, part[:1], limit)
        spent[SINGLE] = alone
    times = _rounds(ways, policies, bench, device, watch)
    return [
        _cost(
            name, times, naive, spent, samples=len(samples), batch=bench.batch, forced=forced, device=device
        )
        for name in ways
    ]


def _rounds(
    ways: dict[str, Way], policies: list[Policy], bench: TuneBench, device: torch.device, watch: Watch
) -> dict[str, list[float]]:
    """Seconds a policy, by way, one number a round."""
    names, times = list(ways), {name: list[float]() for name in ways}
    watch.phase("bench tune", 0, bench.rounds * len(names))
    for number in range(bench.rounds):
        part = policies[number * bench.together : (number + 1) * bench.together]
        first = number % len(names)
        for index, name in enumerate(names[first:] + names[:first]):
            seconds, count = _timed(device, partial(ways[name], part))
            times[name].append(seconds / count)
            watch.phase("bench tune", number * len(names) + index + 1, bench.rounds * len(names))
    return times


def trial_policies(layers: int, trials: int, budget: float, seed: int) -> list[Policy]:
    """Random policies as a search tries them: uneven shares that keep `budget` in the mean, and a core."""
    draw = np.random.default_rng(seed)
    policies = []
    for index in range(trials):
        shares = draw.dirichlet(np.full(layers, 8.0)) * layers * budget
        keep = tuple(float(share) for share in np.minimum(shares, 1.0))
        core = tuple(share / 2 for share in keep)
        policies.append(
            Policy(
                name=f"trial {index}",
                vision_keep=keep,
                vision_compute=core,
                refresh_interval=REFRESHES[index % len(REFRESHES)],
                scorer=ScorerSpec(name=SCORERS[index // len(REFRESHES) % len(SCORERS)]),
            )
        )
    return policies


def _encoded(loaded: LoadedModel, samples: Sequence[Sample], size: int) -> list[dict[str, torch.Tensor]]:
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [loaded.adapter.encode_samples(part) for part in parts]


@torch.inference_mode()
def _generate(
    loaded: LoadedModel, batches: Sequence[dict[str, torch.Tensor]], policies: Sequence[Policy], limit: int
) -> int:
    for policy in policies:
        for encoding in batches:
            with running(loaded, policy) as runtime:
                generate_tokens(loaded, encoding, runtime, lambda cache: None, max_new_tokens=limit)
    return len(policies)


def _timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    _synchronize(device)
    started = time.perf_counter()
    result = work()
    _synchronize(device)
    return time.perf_counter() - started, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cost(
    name: str,
    times: dict[str, list[float]],
    naive: str,
    spent: dict[str, float],
    *,
    samples: int,
    batch: int,
    forced: ForcedSet,
    device: torch.device,
) -> TrialCost:
    seconds, theirs = float(np.median(times[name])), float(np.median(times[naive]))
    speedup, low, high = median_interval(np.array(times[naive]) / np.array(times[name]))
    later = max(spent[name] - spent[naive], 0.0)
    return TrialCost(
        method=name,
        samples=samples,
        batch=1 if name == SINGLE else batch,
        answer_tokens=forced.answer_tokens,
        device=str(device),
        rounds=len(times[name]),
        trial_s=seconds,
        trials_per_minute=60.0 / seconds,
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        preparation_s=spent[name],
        break_even=int(later // (theirs - seconds)) + 1 if theirs > seconds else None,
    )
