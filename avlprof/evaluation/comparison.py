"""The result of a comparison at equal bytes: every answer, one table, and its files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from avlprof.evaluation.intervals import detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.lineup import LineUp
from avlprof.files import replacing, write_text

AGAINST = ("dense", "uniform", "strongest")
COLUMNS = (
    *("budget", "method", "kind", "seeds", "strongest", "samples", "score", "low", "high"),
    *(f"vs_{other}{part}" for other in AGAINST for part in ("", "_low", "_high", "_p")),
    *("detectable", "live_share", "read_share", "live_bytes", "read_bytes_per_step", "output_tokens"),
    "policy_hash",
)
_MEANS = (
    *("score", "generated_tokens"),
    *("live_bytes", "dense_bytes", "read_bytes_per_step"),
)


@dataclass(frozen=True)
class Comparison:
    """Methods at several budgets on the same samples.

    `answers` has one row per `method, kind, budget, seed, sample` with the fields of `Answer`;
    dense stands at budget 1. `strongest` names the baseline of each budget that was best on the
    split of selection. `lineup` has the policies, and what was left out.
    """

    meta: dict[str, Any]
    answers: pd.DataFrame
    lineup: LineUp
    strongest: dict[float, str]

    def summary(self) -> pd.DataFrame:
        """One row per method and budget, dense first, best first within a budget; columns `COLUMNS`.

        Scores are averaged over seeds first. Differences are this method's score less the other's,
        paired by sample, with a 95% interval and the p-value of a sign-flip test, not corrected for
        the number of rows; `detectable` is the drop against dense that these samples show 4 times
        out of 5. NaN is what is not there.
        Shares are of the dense prompt KV; bytes and `output_tokens` are means over samples.
        """
        tables = {key: self._by_sample(*key) for key in self._methods()}
        rows = [self._row(key, tables) for key in tables]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        dense = frame["kind"] == "dense"
        rest = frame[~dense].sort_values(["budget", "score"], ascending=[True, False], kind="stable")
        return pd.concat([frame[dense], rest], ignore_index=True)

    def left_out(self) -> pd.DataFrame:
        """One row per method and budget that could not be compared: `method, kind, budget, floor, reason`."""
        columns = ["method", "kind", "budget", "floor", "reason"]
        return pd.DataFrame([asdict(item) for item in self.lineup.left_out], columns=columns)

    def save(self, folder: Path) -> list[Path]:
        """Write `answers.parquet`, `compare.parquet`, `compare.csv` and `compare.json`; returns the paths."""
        summary = self.summary()
        paths = [folder / name for name in ("answers.parquet", "compare.parquet", "compare.csv")]
        for path, frame in zip(paths, (self.answers, summary, summary), strict=True):
            with replacing(path) as partial:
                if path.suffix == ".csv":
                    frame.to_csv(partial, index=False)
                else:
                    frame.to_parquet(partial, index=False)
        policies = [
            {
                "budget": e.budget,
                "method": e.method,
                "policy": e.policy.model_dump(mode="json", by_alias=True),
            }
            for e in self.lineup.entries
        ]
        tables = {"summary": summary, "left_out": self.left_out()}
        records = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        whole = {"meta": self.meta, **records, "policies": policies}
        write_text(folder / "compare.json", json.dumps(whole, indent=2) + "\n")
        return [*paths, folder / "compare.json"]

    def _methods(self) -> list[tuple[float, str]]:
        keys = self.answers[["budget", "method"]].drop_duplicates()
        return [(float(budget), str(method)) for budget, method in keys.itertuples(index=False)]

    def _by_sample(self, budget: float, method: str) -> pd.DataFrame:
        """Means over seeds, one row a sample."""
        own = self.answers[(self.answers["budget"] == budget) & (self.answers["method"] == method)]
        return own.groupby("sample", sort=True)[list(_MEANS)].mean()

    def _row(self, key: tuple[float, str], tables: dict[tuple[float, str], pd.DataFrame]) -> dict[str, Any]:
        budget, method = key
        own = tables[key]
        of_all = self.answers[(self.answers["budget"] == budget) & (self.answers["method"] == method)]
        score = mean_interval(own["score"].to_numpy())
        row = {
            "budget": budget,
            "method": method,
            "kind": of_all["kind"].iloc[0],
            "seeds": int(of_all["seed"].nunique()),
            "strongest": method == self.strongest.get(budget),
            "samples": score.samples,
            "score": score.mean,
            "low": score.low,
            "high": score.high,
            "live_share": own["live_bytes"].sum() / own["dense_bytes"].sum(),
            "read_share": own["read_bytes_per_step"].sum() / own["dense_bytes"].sum(),
            "live_bytes": own["live_bytes"].mean(),
            "read_bytes_per_step": own["read_bytes_per_step"].mean(),
            "output_tokens": own["generated_tokens"].mean(),
            "policy_hash": " ".join(dict.fromkeys(of_all["policy_hash"])),
            "detectable": math.nan,
        }
        best = (budget, self.strongest.get(budget, ""))
        others = {"dense": (1.0, "dense"), "uniform": (budget, "uniform"), "strongest": best}
        for name, other in others.items():
            row |= dict.fromkeys([f"vs_{name}{part}" for part in ("", "_low", "_high", "_p")], math.nan)
            if other == key or other not in tables:
                continue
            paired = paired_difference(own["score"].to_numpy(), tables[other]["score"].to_numpy())
            row[f"vs_{name}"], row[f"vs_{name}_p"] = paired.difference.mean, paired.p_value
            row[f"vs_{name}_low"], row[f"vs_{name}_high"] = paired.difference.low, paired.difference.high
            if name == "dense" and math.isfinite(paired.sd) and paired.sd > 0:
                row["detectable"] = detectable_drop(score.samples, paired.sd)
        return row
