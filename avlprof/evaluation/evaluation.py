"""The result of a comparison: what was measured, as tidy frames and files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from avlprof.evaluation.intervals import detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.latency import Latency
from avlprof.files import replacing, write_text

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
