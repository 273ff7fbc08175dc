"""Compare methods at equal bytes, and find the strongest of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from avlprof.allocators._base import Evidence
from avlprof.errors import UserError
from avlprof.evaluation.answers import about, generate_answers, prompt_lengths
from avlprof.evaluation.evaluate import check_samples
from avlprof.evaluation.intervals import detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.lineup import LineUp, line_up, seeded
from avlprof.evaluation.store import AnswerStore
from avlprof.files import replacing, write_text
from avlprof.models import LoadedModel
from avlprof.policy import Policy, PromptShape
from avlprof.tasks import Task


@dataclass(frozen=True)
class Strongest:
    """The policy with the highest mean score; `scores` holds every candidate's, in their order.

    Seeds of a random policy are averaged. On a tie the first candidate wins.
    """

    policy: Policy
    scores: tuple[tuple[str, float], ...]


def strongest(
    loaded: LoadedModel,
    task: Task,
    candidates: Sequence[Policy],
    *,
    split: str = "search",
    samples: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    store: AnswerStore | None = None,
    advanced: Callable[[int], None] | None = None,
) -> Strongest:
    """Generate with every candidate on a split and pick the best by the task's metric.

    The score of the winner on the same split flatters it, since it was picked for it; compare on
    another split.

    Args:
        candidates: policies at one budget; see `at_budget`.
        store: answers found there are not generated again.
        advanced: called with the number of answers that were just made or found.

    Raises:
        UserError: no candidate, or a policy does not fit the model.
    """
    if not candidates:
        raise UserError("the strongest of no policy was asked for; give at least one baseline")
    chosen = task.samples(split, samples)
    lengths = prompt_lengths(loaded, chosen) if batch_size > 1 else None
    means = []
    for policy in candidates:
        scores = []
        for run in seeded(policy):
            answers = generate_answers(
                loaded, chosen, run, max_new_tokens=max_new_tokens or task.max_new_tokens,
                batch_size=batch_size, metric=task.metric, lengths=lengths, store=store,
            )  # fmt: skip
            scores.append(np.mean([answer.score for answer in answers]))
            if advanced:
                advanced(len(chosen))
        means.append(float(np.mean(scores)))
    named = tuple((policy.name, mean) for policy, mean in zip(candidates, means, strict=True))
    return Strongest(candidates[int(np.argmax(means))], named)


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


Progress = Callable[[int, int], None]


def compare(
    loaded: LoadedModel,
    task: Task,
    budgets: Sequence[float],
    *,
    baselines: Sequence[Policy],
    given: Sequence[Policy] = (),
    tuned: Sequence[Policy] = (),
    split: str = "held-out",
    select_split: str | None = "search",
    samples: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    evidence: Callable[[], Evidence] | None = None,
    store: AnswerStore | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Generate and judge dense and every method at every budget; `docs/evaluation.md` has the terms.

    Budgets are counted on the prompts of the compared samples, so all methods of a budget hold
    the same bytes to a token a layer. The strongest baseline of a budget is picked on
    `select_split` with as many samples, and tested once on `split`.

    Args:
        budgets: prompt KV live after prefill over dense, in [0, 1].
        baselines, given, tuned: see `line_up`.
        samples: how many of each split; None means what the task calls the split.
        select_split: None picks no strongest baseline.
        evidence: gives what a traced run knows, for policies with an allocator.
        store: answers found there are not generated again.
        progress: called with answers done and in all.

    Raises:
        UserError: no budget, a split that is unknown or stands for both, or a sample without answers.
    """
    if not budgets or batch_size < 1:
        raise UserError("compare needs at least one budget and a batch size of 1 or more")
    if select_split == split:
        raise UserError(f"select_split must differ from split '{split}', or be left out")
    chosen = task.samples(split, samples)
    check_samples(chosen)
    limit = max_new_tokens or task.max_new_tokens
    lengths = prompt_lengths(loaded, chosen) if batch_size > 1 else None
    done, total = 0, len(chosen)

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, max(total, done))

    def rows(run: Policy | None, seed: int, who: dict[str, Any]) -> pd.DataFrame:
        answers = generate_answers(
            loaded, chosen, run, max_new_tokens=limit, batch_size=batch_size, metric=task.metric,
            lengths=lengths, store=store,
        )  # fmt: skip
        advanced(len(answers))
        return pd.DataFrame([who | {"seed": seed} | asdict(answer) for answer in answers])

    parts = [rows(None, 0, {"method": "dense", "kind": "dense", "budget": 1.0})]
    shapes = [PromptShape(int(s), int(v), int(t)) for s, v, t in _shapes(parts[0])]
    asked = tuple(sorted(set(budgets)))
    found = line_up(
        asked, shapes, loaded.adapter.layers, baselines=baselines, given=given, tuned=tuned, evidence=evidence
    )
    candidates = {budget: found.at(budget, "baseline") for budget in asked} if select_split else {}
    picked = sum(len(seeded(e.policy)) for rivals in candidates.values() for e in rivals)
    total += len(chosen) * sum(len(seeded(e.policy)) for e in found.entries)
    total += picked * len(task.samples(select_split, samples)) if select_split else 0
    best: dict[float, str] = {}
    for budget, rivals in candidates.items():
        if rivals and select_split:
            winner = strongest(
                loaded, task, [e.policy for e in rivals], split=select_split, samples=samples,
                max_new_tokens=limit, batch_size=batch_size, store=store, advanced=advanced,
            )  # fmt: skip
            best[budget] = winner.policy.name
    for entry in found.entries:
        who = {"method": entry.method, "kind": entry.kind, "budget": entry.budget}
        parts += [rows(run, seed, who) for seed, run in enumerate(seeded(entry.policy))]
    meta = about(loaded, task, split, len(chosen), limit, batch_size)
    meta |= {"select_split": select_split or "", "budgets": list(asked)}
    return Comparison(meta, pd.concat(parts, ignore_index=True), found, best)


def _shapes(dense: pd.DataFrame) -> Any:
    return dense[["system", "vision", "text"]].itertuples(index=False)
