"""Compare policies with the dense model on the same samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from avlprof.errors import UserError
from avlprof.evaluation.answers import about, generate_answers, prompt_lengths
from avlprof.evaluation.intervals import detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.latency import Latency, measure_latency
from avlprof.evaluation.lineup import Contender, contenders, with_baselines
from avlprof.evaluation.store import Answer, AnswerStore
from avlprof.files import replacing, write_text
from avlprof.models import LoadedModel
from avlprof.policy import DENSE, Policy, PromptShape
from avlprof.runtime.forced.samples import fidelity as measure_fidelity
from avlprof.runtime.support import check_supported
from avlprof.tasks import Sample, Task
from avlprof.watch import Watch

COLUMNS = (
    *("policy", "family", "samples", "score", "low", "high"),
    *("difference", "difference_low", "difference_high", "p_value", "detectable"),
    *("kl", "agreement", "live_share", "read_share", "live_bytes", "allocated_bytes"),
    *("first_token_ms", "tokens_per_s", "peak_mb", "cache_mb", "output_tokens"),
)
_MEANS = (
    *("score", "kl", "agreement", "generated_tokens"),
    *("live_bytes", "dense_bytes", "allocated_bytes", "read_bytes_per_step"),
)


@dataclass(frozen=True)
class Evaluation:
    """Policies compared with the dense model on the same samples; `docs/evaluation.md` explains the numbers.

    `answers` has one row per `policy, seed, sample`: the fields of `Answer`, `family`, and `kl`
    and `agreement` (NaN where not measured). `meta` says what was evaluated, and with what.
    """

    meta: dict[str, Any]
    answers: pd.DataFrame
    latencies: tuple[Latency, ...] = field(default=())

    def frame(self) -> pd.DataFrame:
        """The tidy table of answers, a copy."""
        return self.answers.copy()

    def summary(self) -> pd.DataFrame:
        """One row a policy, dense first; columns `COLUMNS`.

        `score` has a 95% interval; `difference` is to dense, paired by sample, with the p-value of
        a sign-flip test and the smallest drop that these samples could show (`detectable`; NaN
        when no sample's score differs). `kl` (nat a token) and `agreement` are on dense answers.
        Shares are of the dense model's prompt KV, bytes are means over samples, `output_tokens`
        the mean length of answers; MB are 10^6 bytes. NaN is what was not measured.
        """
        dense = self._by_sample("dense")
        rows = [self._row(label, dense) for label in dict.fromkeys(self.answers["policy"])]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def pareto(self) -> pd.DataFrame:
        """What the Pareto figure draws: `policy, family, score, low, high, live_share, read_share, n`."""
        wanted = ["policy", "family", "score", "low", "high", "live_share", "read_share", "samples"]
        return self.summary()[wanted].rename(columns={"samples": "n"})

    def groups(self) -> pd.DataFrame:
        """Mean score by `policy` (rows, dense first) and kind of question (columns)."""
        wide = self.answers.pivot_table(index="policy", columns="group", values="score", sort=False)
        return wide[sorted(wide.columns)]

    def latency_frame(self) -> pd.DataFrame:
        """One row per policy that was timed; the fields of `Latency`."""
        return pd.DataFrame([asdict(latency) for latency in self.latencies])

    def to_csv(self, path: Path | str) -> Path:
        """Write the summary as CSV; returns the path."""
        with replacing(Path(path)) as partial:
            self.summary().to_csv(partial, index=False)
        return Path(path)

    def to_json(self, path: Path | str) -> Path:
        """Write `meta`, summary and latencies as JSON (NaN as null); returns the path."""
        tables = {"summary": self.summary(), "latencies": self.latency_frame()}
        records = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        write_text(Path(path), json.dumps({"meta": self.meta, **records}, indent=2) + "\n")
        return Path(path)

    def to_parquet(self, path: Path | str) -> Path:
        """Write the table of answers as parquet; returns the path."""
        with replacing(Path(path)) as partial:
            self.answers.to_parquet(partial, index=False)
        return Path(path)

    def _by_sample(self, label: str) -> pd.DataFrame:
        """Means over seeds, one row a sample."""
        own = self.answers[self.answers["policy"] == label]
        return own.groupby("sample", sort=True)[list(_MEANS)].mean()

    def _row(self, label: str, dense: pd.DataFrame) -> dict[str, Any]:
        own = self._by_sample(label)
        score = mean_interval(own["score"].to_numpy())
        paired = paired_difference(own["score"].to_numpy(), dense["score"].to_numpy())
        shown = math.isfinite(paired.sd) and paired.sd > 0
        row = {
            "policy": label,
            "family": self.answers.loc[self.answers["policy"] == label, "family"].iloc[0],
            "samples": score.samples,
            "score": score.mean,
            "low": score.low,
            "high": score.high,
            "difference": paired.difference.mean,
            "difference_low": paired.difference.low,
            "difference_high": paired.difference.high,
            "p_value": paired.p_value,
            "detectable": detectable_drop(score.samples, paired.sd) if shown else math.nan,
            "kl": own["kl"].mean(),
            "agreement": own["agreement"].mean(),
            "live_share": own["live_bytes"].sum() / own["dense_bytes"].sum(),
            "read_share": own["read_bytes_per_step"].sum() / own["dense_bytes"].sum(),
            "live_bytes": own["live_bytes"].mean(),
            "allocated_bytes": own["allocated_bytes"].mean(),
            "output_tokens": own["generated_tokens"].mean(),
        }
        if label == "dense":
            row |= dict.fromkeys(("difference_low", "difference_high", "p_value"), math.nan)
        return row | self._times(label)

    def _times(self, label: str) -> dict[str, float]:
        found = next((latency for latency in self.latencies if latency.policy == label), None)
        if found is None:
            return dict.fromkeys(("first_token_ms", "tokens_per_s", "peak_mb", "cache_mb"), math.nan)
        return {
            "first_token_ms": found.first_token_ms,
            "tokens_per_s": found.tokens_per_s,
            "peak_mb": found.peak_bytes / 1e6 if found.peak_bytes is not None else math.nan,
            "cache_mb": found.cache_bytes / 1e6,
        }


Progress = Callable[[int, int], None]
LATENCY_SAMPLES = 2
LATENCY_REPEATS = 3
BUFFERED = "dense (preallocated)"
"""The dense cache in a buffer allocated ahead: the fair baseline of speed, since the stock
`DynamicCache` copies itself at every token."""


def evaluate(
    loaded: LoadedModel,
    task: Task,
    policies: Sequence[Policy],
    *,
    split: str = "held-out",
    samples: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    fidelity: bool = True,
    latency: bool = True,
    baselines: bool = False,
    store: AnswerStore | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Generate, judge and time the dense model and every policy on the same samples.

    Args:
        samples: how many of the split, its first ones; None means what the task calls the split.
        batch_size: of answers and fidelity; latency is always at batch 1.
        fidelity: also measure KL and agreement by teacher forcing.
        latency: also time 2 samples 3 times at batch 1; policies take turns.
        baselines: add uniform and random at the live and read bytes of each policy.
        store: answers found there are not generated again.
        progress: called with units of work done and in all (answers, forced scores, timings).

    Raises:
        UserError: a policy does not fit the model or its runtime, or the split is unknown.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more samples, got {batch_size}")
    chosen = task.samples(split, samples)
    _check(loaded, policies, chosen)
    limit = max_new_tokens or task.max_new_tokens
    found = contenders(policies)
    work = _Work(progress)
    work.total = _units(found, len(chosen), fidelity, latency, baselines)
    lengths = prompt_lengths(loaded, chosen) if batch_size > 1 else None

    def answers_of(run: Policy | None) -> list[Answer]:
        def advanced(done: int, _: int, before: int = work.done) -> None:
            work.at(before + done)

        return generate_answers(
            loaded, chosen, run, max_new_tokens=limit, batch_size=batch_size, metric=task.metric,
            lengths=lengths, store=store, progress=advanced,
        )  # fmt: skip

    dense = answers_of(None)
    if baselines:
        shapes = [PromptShape(a.system, a.vision, a.text) for a in dense]
        steps = round(sum(a.generated_tokens - 1 for a in dense) / len(dense))
        found = with_baselines(found, shapes, loaded.adapter.layers, max(steps, 1))
        work.total = _units(found, len(chosen), fidelity, latency, False)
    rows = [_rows(found[0], 0, dense)]
    for contender in found[1:]:
        rows += [_rows(contender, seed, answers_of(run)) for seed, run in enumerate(contender.runs)]
    table = pd.concat(rows, ignore_index=True).assign(kl=float("nan"), agreement=float("nan"))
    if fidelity:
        order = sorted(chosen, key=lambda sample: lengths[sample.id]) if lengths else chosen
        table = _with_fidelity(table, loaded, order, found, limit, batch_size, work)
    timed = _latencies(loaded, chosen, found, limit, work) if latency else ()
    meta = about(loaded, task, split, len(chosen), limit, batch_size)
    meta["policies"] = {c.label: [run.hash for run in c.runs if run] for c in found}
    return Evaluation(meta, table, timed)


class _Work:
    """Units of work done and in all, told to a progress callback."""

    def __init__(self, progress: Progress | None) -> None:
        self.done, self.total, self._progress = 0, 0, progress

    def at(self, done: int) -> None:
        self.done = done
        if self._progress:
            self._progress(done, max(self.total, done))

    def add(self, units: int) -> None:
        self.at(self.done + units)


class _Counted(Watch):
    """Adds the units of a part to the work."""

    def __init__(self, work: _Work) -> None:
        self._work, self._before = work, work.done

    def phase(self, name: str, done: int, total: int) -> None:
        self._work.at(self._before + done)


def _units(found: Sequence[Contender], samples: int, fidelity: bool, latency: bool, baselines: bool) -> int:
    """Work to do; with baselines to come, four runs are expected for each policy."""
    runs = sum(len(c.runs) for c in found) + (4 * (len(found) - 1) if baselines else 0)
    timings = (len(found) + 1) * min(LATENCY_SAMPLES, samples) * LATENCY_REPEATS
    return runs * samples + (runs - 1) * samples * fidelity + timings * latency


def _check(loaded: LoadedModel, policies: Sequence[Policy], samples: Sequence[Sample]) -> None:
    for policy in policies:
        policy.check_layers(loaded.adapter.layers)
        check_supported(policy)
    check_samples(samples)


def check_samples(samples: Sequence[Sample]) -> None:
    """`UserError` when an id occurs twice, or a sample has no answers to be judged by."""
    ids = [sample.id for sample in samples]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"sample ids must be unique, '{twice}' occurs twice")
    unlabelled = next((sample.id for sample in samples if not sample.answers), None)
    if unlabelled is not None:
        raise UserError(f"sample '{unlabelled}' has no reference answers to be judged by; give it answers")


def _rows(contender: Contender, seed: int, answers: Sequence[Answer]) -> pd.DataFrame:
    named = {"policy": contender.label, "family": contender.family, "seed": seed}
    return pd.DataFrame([named | asdict(answer) for answer in answers])


def _with_fidelity(
    table: pd.DataFrame,
    loaded: LoadedModel,
    samples: Sequence[Sample],
    found: Sequence[Contender],
    limit: int,
    batch_size: int,
    work: _Work,
) -> pd.DataFrame:
    runs = [(c.label, seed, run) for c in found for seed, run in enumerate(c.runs) if run]
    scores = measure_fidelity(
        loaded,
        samples,
        [run for *_, run in runs],
        max_new_tokens=limit,
        batch_size=batch_size,
        watch=_Counted(work),
    )
    keys = ["policy", "seed", "sample"]
    measured = [
        {"policy": label, "seed": seed, "sample": score.sample, "kl": score.kl, "agreement": score.agreement}
        for (label, seed, _), own in zip(runs, scores, strict=True)
        for score in own
    ]
    # the reference on its own answers, by definition
    measured += [
        {"policy": found[0].label, "seed": 0, "sample": sample.id, "kl": 0.0, "agreement": 1.0}
        for sample in samples
    ]
    return table.drop(columns=["kl", "agreement"]).merge(pd.DataFrame(measured), on=keys, how="left")


def _latencies(
    loaded: LoadedModel, samples: Sequence[Sample], found: Sequence[Contender], limit: int, work: _Work
) -> tuple[Latency, ...]:
    timed: dict[str, Policy | None] = {contender.label: contender.runs[0] for contender in found}
    return tuple(
        measure_latency(
            loaded,
            samples[:LATENCY_SAMPLES],
            timed | {BUFFERED: DENSE},
            new_tokens=max(min(limit, 32), 2),
            repeats=LATENCY_REPEATS,
            advanced=work.add,
        )
    )
