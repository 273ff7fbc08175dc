"""Compare methods at equal bytes, and find the strongest of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from avlprof.allocators._base import Evidence
from avlprof.errors import UserError
from avlprof.evaluation.answers import SampleSettings, answers_under
from avlprof.evaluation.doubts import sample_warnings
from avlprof.evaluation.evaluate import check_samples
from avlprof.evaluation.intervals import detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.lineup import Entry, LineUp, all_baselines, line_up, seeded
from avlprof.evaluation.store import AnswerStore, Ask, share_out
from avlprof.files import replacing, write_text
from avlprof.models import LoadedModel
from avlprof.models.adapter import Adapter
from avlprof.models.smaller import SamplePictures
from avlprof.policy import Policy, PromptShape
from avlprof.tasks import Sample, Task
from avlprof.watch import SILENT, Part, Steps, Watch


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(SampleSettings):
    """What a comparison stands on, beside which samples are answered and how.

    Attributes:
        select_split: picks the strongest baseline of a budget, with as many samples; None picks none.
        baselines: hand-set policies to compare with; None means all that ship (but those of single papers and
            models), and `SMALLER`.
        evidence: gives what a traced run knows, for policies with an allocator; asked only when needed.

    Raises:
        UserError: a number is below 1, or one split stands for both.
    """

    select_split: str | None = "search"
    baselines: Sequence[Policy] | None = None
    evidence: Callable[[], Evidence] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select_split == self.split:
            raise UserError(f"select_split must differ from split '{self.split}', or be left out")


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
    settings: ComparisonSettings | None = None,
    *,
    store: AnswerStore | None = None,
    watch: Watch = SILENT,
) -> Strongest:
    """Generate with every candidate on the split of selection and pick the best by the task's metric.

    The score of the winner on the same split flatters it, since it was picked for it; compare on
    another split.

    Args:
        candidates: policies at one budget; see `avlprof.budgets.scale_to`.
        settings: which samples are answered, and how; see `ComparisonSettings.select_split`.
        store: answers found there are not generated again.
        watch: its phase `strongest` counts answers.

    Raises:
        UserError: no candidate, no split of selection, or a policy does not fit the model.
    """
    settings = settings or ComparisonSettings()
    if not candidates:
        raise UserError("the strongest of no policy was asked for; give at least one baseline")
    if settings.select_split is None:
        raise UserError("the strongest policy is picked on a split; give select_split")
    samples = task.samples(settings.select_split, settings.samples)
    answering = settings.answering(loaded, task, samples)
    runs = [(at, run) for at, policy in enumerate(candidates) for run in seeded(policy)]
    policies, part = [run for _, run in runs], Part(watch, "strongest")
    found = answers_under(loaded, samples, policies, answering, store=store, watch=part)
    scores = pd.Series([np.mean([answer.score for answer in answers]) for answers in found])
    means = scores.groupby([at for at, _ in runs]).mean().tolist()
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

    def warnings(self) -> list[str]:
        """What these samples cannot show, a sentence each: too few of them, or dense scores nothing."""
        return sample_warnings(self._by_sample(1.0, "dense")["score"].to_numpy(dtype=float))

    def scores(self, budget: float, method: str) -> list[float]:
        """The score of each sample in the order of their ids, seeds averaged; dense stands at budget 1."""
        return [float(score) for score in self._by_sample(budget, method)["score"]]

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
        whole = {"meta": self.meta, "warnings": self.warnings(), **records, "policies": policies}
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


def compare(
    loaded: LoadedModel,
    task: Task,
    budgets: Sequence[float],
    *,
    given: Sequence[Policy] = (),
    tuned: Sequence[Policy] = (),
    settings: ComparisonSettings | None = None,
    store: AnswerStore | None = None,
    watch: Watch = SILENT,
) -> Comparison:
    """Generate and judge dense and every method at every budget; `docs/evaluation.md` has the terms.

    Budgets are counted on the prompts of the compared samples, so all methods of a budget hold
    the same bytes to a token a layer. The strongest baseline of a budget is picked on the split
    of selection, and tested once on the other.

    Args:
        budgets: prompt KV live after prefill over dense, in [0, 1].
        given: policies of your own, which are scaled to each budget (`avlprof.budgets.scale_to`).
        tuned: policies that stand at the budget that they were tuned at, and at no other.
        settings: which samples, which baselines; by default all held-out samples and all that ship.
        store: answers found there are not generated again.
        watch: its phase `compare` counts answers.

    Raises:
        UserError: no budget, a split that is unknown, or a sample without answers.
    """
    if not budgets:
        raise UserError("compare needs at least one budget, such as 0.2")
    settings = settings or ComparisonSettings()
    samples = task.samples(settings.split, settings.samples)
    check_samples(samples)
    answering = settings.answering(loaded, task, samples)
    if note := loaded.adapter.partly_governed:
        watch.say(note)
    steps = Steps(watch, "compare", len(samples))

    def tables(runs: Sequence[tuple[Policy | None, dict[str, Any]]]) -> list[pd.DataFrame]:
        policies = [run for run, _ in runs]
        found = answers_under(loaded, samples, policies, answering, store=store, watch=steps.part())
        steps.add(len(runs) * len(samples))
        return [
            pd.DataFrame([who | asdict(answer) for answer in answers])
            for (_, who), answers in zip(runs, found, strict=True)
        ]

    share_out(store, loaded, lambda: [settings.ask([None], samples, answering)], steps.part())
    parts = tables([(None, {"method": "dense", "kind": "dense", "budget": 1.0, "seed": 0})])
    said = dict(zip(parts[0]["sample"], parts[0]["generated_tokens"], strict=True))
    answering = answering.knowing(said)
    ascending = tuple(sorted(set(budgets)))
    lineup = line_up(
        ascending,
        _shapes(parts[0], loaded.adapter),
        loaded.adapter.layers,
        baselines=all_baselines(given) if settings.baselines is None else settings.baselines,
        given=given,
        tuned=tuned,
        evidence=settings.evidence,
        pictures=SamplePictures(loaded.adapter, samples),
    )
    candidates = {budget: _candidates(lineup, budget, settings) for budget in ascending}
    selected = len(_selection(task, settings))
    steps.total += len(samples) * _runs(lineup.entries) + selected * sum(map(_runs, candidates.values()))
    ahead = partial(_asks, loaded, task, lineup, [*chain.from_iterable(candidates.values())], settings)
    share_out(store, loaded, ahead, steps.part())
    best: dict[float, str] = {}
    for budget, entries in candidates.items():
        if entries:
            policies = [entry.policy for entry in entries]
            winner = strongest(loaded, task, policies, settings, store=store, watch=steps.part())
            steps.add(selected * _runs(entries))
            best[budget] = winner.policy.name
    parts += tables(
        [
            (run, {"method": entry.method, "kind": entry.kind, "budget": entry.budget, "seed": seed})
            for entry in lineup.entries
            for seed, run in enumerate(seeded(entry.policy))
        ]
    )
    meta = settings.about(loaded, task, len(samples))
    meta |= {"select_split": settings.select_split or "", "budgets": list(ascending)}
    return Comparison(meta, pd.concat(parts, ignore_index=True), lineup, best)


def _selection(task: Task, settings: ComparisonSettings) -> Sequence[Sample]:
    return task.samples(settings.select_split, settings.samples) if settings.select_split else ()


def _asks(
    loaded: LoadedModel, task: Task, lineup: LineUp, candidates: Iterable[Entry], settings: ComparisonSettings
) -> Iterator[Ask]:
    """What is asked for once the line-up is known, in this order: the selections, then the methods."""
    both: list[tuple[ComparisonSettings, Iterable[Entry]]] = [(settings, lineup.entries)]
    if settings.select_split:
        both.insert(0, (replace(settings, split=settings.select_split, select_split=None), candidates))
    for chosen, entries in both:
        samples = task.samples(chosen.split, chosen.samples)
        answering = chosen.answering(loaded, task, samples)
        runs = [run for entry in entries for run in seeded(entry.policy)]
        yield chosen.ask(runs, samples, answering)


def _candidates(lineup: LineUp, budget: float, settings: ComparisonSettings) -> Sequence[Entry]:
    """Who may be the strongest baseline of a budget."""
    return lineup.at(budget, "baseline") if settings.select_split else ()


def _runs(entries: Sequence[Entry]) -> int:
    """How often a split is answered for these methods: once for each seed of each."""
    return sum(len(seeded(entry.policy)) for entry in entries)


def _shapes(dense: pd.DataFrame, adapter: Adapter) -> list[PromptShape]:
    rows = dense[["system", "vision", "text"]].itertuples(index=False)
    return [PromptShape(int(a), int(b), int(c), adapter.governed, adapter.group) for a, b, c in rows]
