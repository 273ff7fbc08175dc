"""Compare policies with the dense model on the same samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from avlprof.errors import UserError
from avlprof.evaluation.answers import AnswerSettings, SampleSettings, answers_under
from avlprof.evaluation.doubts import sample_warnings
from avlprof.evaluation.intervals import detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.latency import Latency, measure_latency
from avlprof.evaluation.lineup import PolicyRow, counted_with, policy_rows, with_baselines
from avlprof.evaluation.store import Answer, AnswerStore, share_out
from avlprof.files import replacing, write_text
from avlprof.models import LoadedModel
from avlprof.models.smaller import SamplePictures, check_kind
from avlprof.policy import DENSE, Policy, PromptShape
from avlprof.runtime.forced.samples import fidelity as measure_fidelity
from avlprof.runtime.support import check_supported
from avlprof.tasks import Sample, Task
from avlprof.watch import SILENT, Steps, Watch

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

    def warnings(self) -> list[str]:
        """What these samples cannot show, a sentence each: too few of them, or dense scores nothing."""
        return sample_warnings(self._by_sample("dense")["score"].to_numpy(dtype=float))

    def pareto(self) -> pd.DataFrame:
        """What the Pareto figure draws: `policy, family, score, low, high, live_share, read_share, n`."""
        columns = ["policy", "family", "score", "low", "high", "live_share", "read_share", "samples"]
        return self.summary()[columns].rename(columns={"samples": "n"})

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
        """Write `meta`, warnings, summary and latencies as JSON (NaN as null); returns the path."""
        tables = {"summary": self.summary(), "latencies": self.latency_frame()}
        records = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        whole = {"meta": self.meta, "warnings": self.warnings(), **records}
        write_text(Path(path), json.dumps(whole, indent=2) + "\n")
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
        differs = math.isfinite(paired.sd) and paired.sd > 0
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
            "detectable": detectable_drop(score.samples, paired.sd) if differs else math.nan,
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
        latency = next((latency for latency in self.latencies if latency.policy == label), None)
        if latency is None:
            return dict.fromkeys(("first_token_ms", "tokens_per_s", "peak_mb", "cache_mb"), math.nan)
        return {
            "first_token_ms": latency.first_token_ms,
            "tokens_per_s": latency.tokens_per_s,
            "peak_mb": latency.peak_bytes / 1e6 if latency.peak_bytes is not None else math.nan,
            "cache_mb": latency.cache_bytes / 1e6,
        }


LATENCY_SAMPLES = 2
LATENCY_REPEATS = 3
BUFFERED = "dense (preallocated)"
"""The dense cache in a buffer allocated ahead: the fair baseline of speed, since the stock
`DynamicCache` copies itself at every token."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(SampleSettings):
    """What an evaluation generates and measures, beside which samples are answered and how.

    Attributes:
        baselines: add uniform and random at the live and read bytes of each policy.
        fidelity: also measure KL and agreement by teacher forcing.
        latency: also time 2 samples 3 times at batch 1; policies take turns.
    """

    baselines: bool = False
    fidelity: bool = True
    latency: bool = True

    def units(self, rows: Sequence[PolicyRow], samples: int, baselines_to_come: bool = False) -> int:
        """Work to do: answers, forced scores, timings; baselines to come count as four runs a policy."""
        runs = sum(len(row.runs) for row in rows) + (4 * (len(rows) - 1) if baselines_to_come else 0)
        timings = (len(rows) + 1) * min(LATENCY_SAMPLES, samples) * LATENCY_REPEATS
        forced = (runs - 1) * samples * self.fidelity
        return runs * samples + forced + timings * self.latency


def evaluate(
    loaded: LoadedModel,
    task: Task,
    policies: Sequence[Policy],
    settings: EvaluationSettings | None = None,
    *,
    store: AnswerStore | None = None,
    watch: Watch = SILENT,
) -> Evaluation:
    """Generate, judge and time the dense model and every policy on the same samples.

    Args:
        settings: which samples, and what is measured; by default all held-out ones, without baselines.
        store: answers found there are not generated again.
        watch: its phase `evaluate` counts units of work (answers, forced scores, timings).

    Raises:
        UserError: a policy does not fit the model or its runtime, or the split is unknown.
    """
    settings = settings or EvaluationSettings()
    samples = task.samples(settings.split, settings.samples)
    _check(loaded, policies, samples)
    if note := loaded.adapter.partly_governed:
        watch.say(note)
    rows = policy_rows(policies)
    steps = Steps(watch, "evaluate", settings.units(rows, len(samples), settings.baselines))
    answering = settings.answering(loaded, task, samples)

    def answers_of(runs: Sequence[Policy | None]) -> list[list[Answer]]:
        share_out(store, loaded, lambda: [settings.ask(runs, samples, answering)], steps.part())
        answers = answers_under(loaded, samples, runs, answering, store=store, watch=steps.part())
        steps.add(len(runs) * len(samples))
        return answers

    dense = answers_of([None])[0]
    answering = answering.knowing({answer.sample: answer.generated_tokens for answer in dense})
    pictures = SamplePictures(loaded.adapter, samples)
    if settings.baselines:
        own = loaded.adapter
        shapes: Sequence[PromptShape] = [
            PromptShape(a.system, a.vision, a.text, own.governed, own.group) for a in dense
        ]
        for policy in policies:
            shapes = counted_with(policy, shapes, pictures)
        length = round(sum(a.generated_tokens - 1 for a in dense) / len(dense))
        rows = with_baselines(rows, shapes, loaded.adapter.layers, max(length, 1))
        steps.total = settings.units(rows, len(samples))
    runs = [(row, seed, policy) for row in rows[1:] for seed, policy in enumerate(row.runs)]
    found = answers_of([policy for *_, policy in runs])
    tables = [_table(rows[0], 0, dense)]
    tables += [_table(row, seed, answers) for (row, seed, _), answers in zip(runs, found, strict=True)]
    table = pd.concat(tables, ignore_index=True).assign(kl=float("nan"), agreement=float("nan"))
    answering.encoded.forget()  # memory that what is timed must not count
    if settings.fidelity:
        table = _with_fidelity(table, loaded, samples, rows, answering, steps)
    timed = _latencies(loaded, samples, rows, answering, steps) if settings.latency else ()
    meta = settings.about(loaded, task, len(samples))
    meta["policies"] = {row.label: [policy.hash for policy in row.runs if policy] for row in rows}
    return Evaluation(meta, table, timed)


def _check(loaded: LoadedModel, policies: Sequence[Policy], samples: Sequence[Sample]) -> None:
    for policy in policies:
        policy.check_layers(loaded.adapter.layers)
        if policy.shrinks and policy.pictures is not None:
            check_kind(loaded.adapter, policy.pictures.kind)
        check_supported(policy)
    check_samples(samples)


def check_ids(samples: Sequence[Sample]) -> None:
    """`UserError` when an id occurs twice."""
    ids = [sample.id for sample in samples]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"sample ids must be unique, '{twice}' occurs twice")


def check_samples(samples: Sequence[Sample]) -> None:
    """`UserError` when an id occurs twice, or a sample has no answers to be judged by."""
    check_ids(samples)
    unlabelled = next((sample.id for sample in samples if not sample.answers), None)
    if unlabelled is not None:
        raise UserError(f"sample '{unlabelled}' has no reference answers to be judged by; give it answers")


def _table(row: PolicyRow, seed: int, answers: Sequence[Answer]) -> pd.DataFrame:
    named = {"policy": row.label, "family": row.family, "seed": seed}
    return pd.DataFrame([named | asdict(answer) for answer in answers])


def _with_fidelity(
    table: pd.DataFrame,
    loaded: LoadedModel,
    samples: Sequence[Sample],
    rows: Sequence[PolicyRow],
    answering: AnswerSettings,
    steps: Steps,
) -> pd.DataFrame:
    lengths = answering.lengths
    order = sorted(samples, key=lambda sample: lengths[sample.id]) if lengths else samples
    runs = [
        (row.label, seed, policy)
        for row in rows
        for seed, policy in enumerate(row.runs)
        if policy is not None
    ]
    scores = measure_fidelity(
        loaded,
        order,
        [policy for *_, policy in runs],
        max_new_tokens=answering.max_new_tokens,
        batch_size=answering.batch_size,
        watch=steps.part(),
    )
    steps.add(len(runs) * len(order))
    keys = ["policy", "seed", "sample"]
    measured = [
        {"policy": label, "seed": seed, "sample": score.sample, "kl": score.kl, "agreement": score.agreement}
        for (label, seed, _), own in zip(runs, scores, strict=True)
        for score in own
    ]
    # the reference on its own answers, by definition
    measured += [
        {"policy": rows[0].label, "seed": 0, "sample": sample.id, "kl": 0.0, "agreement": 1.0}
        for sample in order
    ]
    return table.drop(columns=["kl", "agreement"]).merge(pd.DataFrame(measured), on=keys, how="left")


def _latencies(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    rows: Sequence[PolicyRow],
    answering: AnswerSettings,
    steps: Steps,
) -> tuple[Latency, ...]:
    policies = {row.label: row.runs[0] for row in rows}
    latencies = measure_latency(
        loaded,
        samples[:LATENCY_SAMPLES],
        policies | {BUFFERED: DENSE},
        new_tokens=max(min(answering.max_new_tokens, 32), 2),
        repeats=LATENCY_REPEATS,
        watch=steps.part(),
    )
    return tuple(latencies)
