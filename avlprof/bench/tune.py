"""What a trial of a search costs: forced scoring against generating anew, interleaved in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import optuna
import torch

from avlprof.allocators import Evidence
from avlprof.bench.trace import median_interval
from avlprof.errors import UserError
from avlprof.evaluation.generating import generate_tokens, running
from avlprof.models import LoadedModel
from avlprof.policy import Policy, PromptShape
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Sample, Task
from avlprof.tuning import Budget, Space
from avlprof.tuning.candidate import scorer_spec
from avlprof.tuning.storages._base import quiet
from avlprof.watch import SILENT, Watch

T = TypeVar("T")
Way = Callable[[list[Policy]], int]
"""Judges policies, and says how many it judged."""

ALLOCATORS = ("uniform", "pyramid", "sigmoid")
"""Those of the default search that need no traced run."""
SINGLE = "generate, batch 1"


@dataclass(frozen=True)
class TrialCost:
    """One way to judge a policy on all samples.

    `trial_s` is the median over rounds of the seconds that a policy takes; `trials_per_minute` follows
    from it, and `per_hour`, which has a 95% interval over rounds. Where `workers` processes score side by
    side, these are of the sum of theirs. `cpu_s` are the seconds of a core that a policy takes. `speedup` is
    the time of `generate, batch B` over this one's in the same round, with its 95% interval (NaN for
    processes side by side, which have rounds of their own). `preparation_s` is paid once for all trials:
    dense answers and prefilled prompts; for the naive ways the encoding of prompts and pictures, which
    their trials are thus spared. `break_even` is the number of trials from which on, preparation included,
    this way is quicker than `generate, batch B`; None where it never is, and for processes side by side.
    """

    method: str
    samples: int
    batch: int
    answer_tokens: float
    device: str
    rounds: int
    trial_s: float
    trials_per_minute: float
    per_hour: float
    per_hour_low: float
    per_hour_high: float
    cpu_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    preparation_s: float
    break_even: int | None
    workers: int = 1


@dataclass(frozen=True)
class TuneBench:
    """What is judged, and how it is taken together.

    Attributes:
        samples: of the search split, that every policy is judged on.
        trials: policies in all, a multiple of `together` after rounding up.
        batch: samples that are generated at a time.
        together: policies of a round.
        budget: share of the dense prompt KV that a policy keeps, in bytes.
        max_new_tokens: the longest answer; the task's when None.
        single: whether to generate at batch 1 too.
        seed: of the policies.

    Raises:
        UserError: a number is out of its range.
    """

    samples: int = 64
    trials: int = 16
    batch: int = 32
    together: int = 8
    budget: float = 0.2
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
    (preparing, _), (forced, policies) = timed(device, lambda: prepared(loaded, task, bench))
    (encoded, _), batches = timed(device, lambda: _encoded(loaded, samples, bench.batch))
    naive = f"generate, batch {bench.batch}"
    ways: dict[str, Way] = {
        **forced_ways(forced, bench),
        naive: lambda part: _generate(loaded, batches, part, limit),
    }
    spent = dict.fromkeys(ways, encoded) | dict.fromkeys(list(ways)[:2], preparing)
    if bench.single:
        (alone, _), singles = timed(device, lambda: _encoded(loaded, samples, 1))
        ways[SINGLE] = lambda part: _generate(loaded, singles, part[:1], limit)
        spent[SINGLE] = alone
    times = _rounds(ways, policies, bench, device, watch)
    return [
        cost_of(
            name, times, naive, spent, samples=len(samples), batch=bench.batch, forced=forced, device=device
        )
        for name in ways
    ]


def prepared(loaded: LoadedModel, task: Task, bench: TuneBench) -> tuple[ForcedSet, list[Policy]]:
    """All that is made once for all trials, dense rows included, and the policies.

    Raises:
        UserError: every dense answer ends at its first token, so that there is no step to score.
    """
    forced = ForcedSet.prepare(
        loaded,
        task.samples("search", bench.samples),
        max_new_tokens=bench.max_new_tokens or task.max_new_tokens,
        batch_size=bench.batch,
        scorers=[scorer_spec(name) for name in Space().scorers],
    )
    if not forced.answer_tokens:
        raise UserError("every dense answer ends at its first token; choose a task with longer answers")
    count = bench.rounds * bench.together
    tokens = max(shape.vision for shape in forced.shapes)
    evidence = Evidence(loaded.adapter.layers, tokens, governed=loaded.adapter.governed)
    policies = trial_policies(evidence, forced.shapes, count, bench.budget, bench.seed)
    forced.score(policies[0])
    return forced, policies


def forced_ways(forced: ForcedSet, bench: TuneBench) -> dict[str, Way]:
    """Forced scoring of policies one by one and together, by name."""
    return {
        "forced": lambda part: len([forced.score(policy) for policy in part]),
        f"forced, {bench.together} together": lambda part: len(forced.score_many(part)),
    }


Times = list[tuple[float, float]]
"""Seconds a policy, by the clock and of a core, one pair a round."""


def _rounds(
    ways: dict[str, Way], policies: list[Policy], bench: TuneBench, device: torch.device, watch: Watch
) -> dict[str, Times]:
    """What each way takes."""
    names, times = list(ways), {name: Times() for name in ways}
    watch.phase("bench tune", 0, bench.rounds * len(names))
    for number in range(bench.rounds):
        part = policies[number * bench.together : (number + 1) * bench.together]
        first = number % len(names)
        for index, name in enumerate(names[first:] + names[:first]):
            (seconds, cpu), count = timed(device, partial(ways[name], part))
            times[name].append((seconds / count, cpu / count))
            watch.phase("bench tune", number * len(names) + index + 1, bench.rounds * len(names))
    return times


def trial_policies(
    evidence: Evidence, prompts: Sequence[PromptShape], trials: int, budget: float, seed: int
) -> list[Policy]:
    """Policies as a search tries them: the default ranking in 4 bits, then random ones of the default space.

    Without what needs a traced run or a read budget; all meet `budget` on the prompts, in bytes.

    Raises:
        UserError: text alone needs more than the budget.
    """
    share = Budget(budget, None, tuple(prompts), 1)
    space = Space(allocators=ALLOCATORS).within(share, evidence.layers)
    plain = next(start for start in space.starts() if start.vision_bits == 4)
    with quiet():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        drawn = [space.suggest(study.ask(), share) for _ in range(trials - 1)]
    return [
        candidate.policy(evidence, share, f"trial {index}") for index, candidate in enumerate([plain, *drawn])
    ]


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


def timed(device: torch.device, work: Callable[[], T]) -> tuple[tuple[float, float], T]:
    """Seconds by the clock and of a core, and what the work gives."""
    _synchronize(device)
    started, before = time.perf_counter(), time.process_time()
    result = work()
    _synchronize(device)
    return (time.perf_counter() - started, time.process_time() - before), result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cost_of(
    name: str,
    times: dict[str, Times],
    naive: str,
    spent: dict[str, float],
    *,
    samples: int,
    batch: int,
    forced: ForcedSet,
    device: torch.device,
) -> TrialCost:
    (own, cpu), slow = np.array(times[name]).T, np.array(times[naive])[:, 0]
    seconds, theirs = float(np.median(own)), float(np.median(slow))
    speedup, low, high = median_interval(slow / own)
    rate, least, most = median_interval(3600.0 / own)
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
        per_hour=rate,
        per_hour_low=least,
        per_hour_high=most,
        cpu_s=float(np.median(cpu)),
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        preparation_s=spent[name],
        break_even=int(later // (theirs - seconds)) + 1 if theirs > seconds else None,
    )
