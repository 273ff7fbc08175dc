"""How many policies several processes score in an hour, each with one thread, beginning together."""

from __future__ import annotations

import math
import multiprocessing
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from avlprof.bench.trace import median_interval
from avlprof.bench.tune import Times, TrialCost, TuneBench, cost_of, forced_ways, prepared, timed
from avlprof.models import ModelSpec, load_model
from avlprof.tasks.spec import TaskSpec
from avlprof.watch import SILENT, Watch


def run_side_by_side(
    model: ModelSpec, task: TaskSpec, bench: TuneBench, workers: int, watch: Watch = SILENT
) -> list[TrialCost]:
    """Forced scoring by so many processes at once, each with one thread and policies of its own.

    In each round they begin together; `per_hour` is the sum of what each does in it.

    Args:
        watch: told how many ways were timed, over all processes, as the phase `side by side`.

    Raises:
        UserError: as `run_tune_bench`.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads of torch may hang
    gate, done = context.Barrier(workers), context.Value("i", 0)
    total = workers * bench.rounds * 2
    watch.phase("side by side", 0, total)
    with ProcessPoolExecutor(workers, context, _enter, (gate, done)) as pool:
        plans = [replace(bench, seed=bench.seed + number) for number in range(workers)]
        parts = [pool.submit(_side, model, task, plan) for plan in plans]
        while wait(parts, timeout=0.5).not_done:
            watch.phase("side by side", done.value, total)
    watch.phase("side by side", total, total)
    return together(_results(parts))


_Side = tuple[dict[str, TrialCost], dict[str, Times]]


def together(sides: Sequence[_Side]) -> list[TrialCost]:
    """A row a way, of what all processes did in it: in each round the sum of what each does in an hour."""
    rows = []
    for name, first in sides[0][0].items():
        which = "1 process" if len(sides) == 1 else f"{len(sides)} processes"
        each = np.array([times[name] for _, times in sides])  # [workers, rounds, 2]
        rate, low, high = median_interval((3600.0 / each[..., 0]).sum(axis=0))
        changed: dict[str, Any] = {
            "method": f"{name}, {which}",
            "trial_s": 3600.0 / rate,
            "trials_per_minute": rate / 60.0,
            "per_hour": rate,
            "per_hour_low": low,
            "per_hour_high": high,
            "cpu_s": float(np.median(each[..., 1])),
            "speedup": math.nan,
            "speedup_low": math.nan,
            "speedup_high": math.nan,
            "break_even": None,
            "workers": len(sides),
        }
        rows.append(replace(first, **changed))
    return rows


_shared: list[Any] = []


def _enter(*shared: Any) -> None:
    """In a process of `run_side_by_side`: the gate where all wait, and the count of what is done."""
    _shared.extend(shared)


def _side(model: ModelSpec, task: TaskSpec, bench: TuneBench) -> _Side:
    gate, done = _shared
    torch.set_num_threads(1)
    try:
        loaded = load_model(model)
        device = loaded.model.device
        (spent, _), (forced, policies) = timed(device, lambda: prepared(loaded, task.load(), bench))
        ways = forced_ways(forced, bench)
        times = {name: Times() for name in ways}
        for number in range(bench.rounds):
            part = policies[number * bench.together : (number + 1) * bench.together]
            for name, way in ways.items():
                gate.wait()
                (seconds, cpu), count = timed(device, partial(way, part))
                times[name].append((seconds / count, cpu / count))
                with done.get_lock():
                    done.value += 1
    except BaseException:
        gate.abort()  # so that the others do not wait
        raise
    rows = {
        name: cost_of(
            name,
            times,
            name,
            dict.fromkeys(times, spent),
            samples=bench.samples,
            batch=bench.batch,
            forced=forced,
            device=device,
        )
        for name in ways
    }
    return rows, times


def _results(parts: Sequence[Future[_Side]]) -> list[_Side]:
    """What all processes found; the error of the one that failed first of all."""
    errors = [error for part in parts if (error := part.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [part.result() for part in parts]
