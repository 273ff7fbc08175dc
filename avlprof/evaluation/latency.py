"""Seconds and peak memory of generation at batch 1, policies measured in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avlprof.errors import UserError
from avlprof.evaluation.batches import EncodedBatches
from avlprof.evaluation.footprint import cache_bytes
from avlprof.evaluation.generating import generate_tokens, running
from avlprof.models import LoadedModel
from avlprof.models.smaller import smaller_pictures
from avlprof.policy import Policy
from avlprof.tasks import Sample
from avlprof.watch import SILENT, Watch


@dataclass(frozen=True)
class Latency:
    """What one policy's generation took, medians over `measurements`.

    `first_token_ms` is prefill, eviction and the choice of the first token, pictures processed
    before; `tokens_per_s` is of the decoding steps behind it. `peak_bytes` is the highest
    `torch.cuda.max_memory_allocated` of any measurement, weights and activations included, and
    None off CUDA, where a process has no such number of its own. `cache_bytes` is the largest
    storage behind the cache when the answer has ended, on any device.
    """

    policy: str
    first_token_ms: float
    tokens_per_s: float
    peak_bytes: int | None
    cache_bytes: int
    measurements: int


@dataclass(frozen=True)
class _Timed:
    first_token: float
    per_second: float
    peak: int | None
    cache: int


def measure_latency(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy | None],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    watch: Watch = SILENT,
) -> list[Latency]:
    """Time every policy on every sample `repeats` times; None stands for the stock model.

    In a round each policy generates the same prompt once, and rounds begin with another policy
    each, so that drift of the machine meets all alike. Every policy warms up once. Each answer has
    exactly `new_tokens` tokens, whatever the policy says: lengths of answers are compared
    elsewhere.

    Args:
        watch: its phase `latency` counts measurements.

    Raises:
        UserError: no samples, fewer than 2 new tokens, or fewer than 1 repeat.
    """
    if not samples or new_tokens < 2 or repeats < 1:
        raise UserError(
            f"latency needs a sample, 2 or more new tokens and a repeat, got {len(samples)} samples, "
            f"{new_tokens} tokens, {repeats} repeats"
        )
    names = list(policies)
    times: dict[str, list[_Timed]] = {name: [] for name in names}
    done, total = 0, len(samples) * repeats * len(names)
    encoded = EncodedBatches()

    def timed(sample: Sample, policy: Policy | None) -> _Timed:
        shown = None if policy is None else policy.pictures
        with smaller_pictures(loaded, shown) as model:
            encoding = encoded.of(model, [sample], shown)
            return _timed(model, encoding, policy and policy.of_cache, new_tokens)

    for number, sample in enumerate(samples):
        if number == 0:
            for name in names:
                timed(sample, policies[name])
        for turn in range(repeats):
            first = (number * repeats + turn) % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(timed(sample, policies[name]))
                done += 1
                watch.phase("latency", done, total)
    return [_summary(name, times[name]) for name in names]


@torch.inference_mode()
def _timed(
    loaded: LoadedModel, encoding: dict[str, Tensor], policy: Policy | None, new_tokens: int
) -> _Timed:
    device = loaded.model.device
    stamps: list[float] = []
    seen: list[int] = []

    def note(cache: Any) -> None:
        _synchronize(device)
        stamps.append(time.perf_counter())
        if len(stamps) == new_tokens:
            seen.append(cache_bytes(cache))

    with running(loaded, policy) as runtime:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _synchronize(device)
        started = time.perf_counter()
        generate_tokens(loaded, encoding, runtime, note, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    per_second = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return _Timed(stamps[0] - started, per_second, peak, seen[-1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(name: str, times: list[_Timed]) -> Latency:
    peaks = [timed.peak for timed in times if timed.peak is not None]
    return Latency(
        policy=name,
        first_token_ms=1000 * statistics.median(timed.first_token for timed in times),
        tokens_per_s=statistics.median(timed.per_second for timed in times),
        peak_bytes=max(peaks) if peaks else None,
        cache_bytes=max(timed.cache for timed in times),
        measurements=len(times),
    )
