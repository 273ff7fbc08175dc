"""What a refresh is worth at a read budget: the table of docs/tuning.md.

    OMP_NUM_THREADS=1 python -m tools.refresh shapes:describe,read,row --run RUN --out refresh

At each memory budget, with reads of half of it and one ranking: the core of the prompt that is never picked
anew, cores picked by the refresh's row alone and by running scores, by all layers or by a few that lead the
others (as the run's overlap of layers says), the same with what is not core in 4 bits, and in 4 and 3 bits no
core at all. Shares are even over layers. Finished answers are kept in the folder.

With `--when` no answer is made: at one size of core and of memory, KL to the dense model by how often steps
refresh, at fixed steps and where they are triggered (`when.csv`). Nor with `--who`: at the budgets, KL by
which layers lead at every step, beside the overlap of layers in the run (`who.csv`).
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import avlprof
from avlprof.allocators import Evidence
from avlprof.analysis import Profile
from avlprof.analysis.derive import leading_layers
from avlprof.budgets import ReadBudget, meet_both, meet_budget
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore, Evaluation, paired_difference
from avlprof.evaluation.damage import rank_correlation
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.policy import RANKING, CoreScore, Policy, PromptShape, ScorerSpec
from avlprof.runs.directory import RunDirectory
from avlprof.runtime.forced import ForcedSet
from tools.ranking import shapes_of

STATIC = "static core"
SCORES = {"row": CoreScore(), "scores": CoreScore(prompt=0.5, memory=0.5)}


def cored(reads: ReadBudget, memory: float, shapes: Sequence[PromptShape], layers: int, bits: int) -> Policy:
    """A core at both budgets, even over layers."""
    keep, compute = meet_both((1.0,) * layers, shapes, memory, reads, bits=bits)
    return Policy(
        vision_keep=keep,
        vision_compute=compute,
        refresh_interval=reads.refresh_interval,
        refresh=reads.refresh,
        refresh_layers=reads.refresh_layers,
        vision_bits=bits,
        scorer=ScorerSpec.of(RANKING),
    )


Refreshes = Mapping[str, tuple[int, tuple[int, ...] | None]]
"""Of each name, the interval and the layers that lead."""


def policies(
    memory: float, shapes: Sequence[PromptShape], layers: int, steps: int, refreshes: Refreshes
) -> Iterator[Policy]:
    """Who is compared at a memory budget; what its reads do not allow is left out, with a line."""
    even, read = (1.0,) * layers, memory / 2
    yield cored(ReadBudget(read, steps), memory, shapes, layers, 16).model_copy(update={"name": STATIC})
    for bits in (4, 3):
        keep = meet_budget(even, shapes, read, bits=bits)
        named = f"no core, {bits} bits"
        yield Policy(name=named, vision_keep=keep, vision_bits=bits, scorer=ScorerSpec.of(RANKING))
    for bits in (16, 4):
        for said, (interval, leads) in refreshes.items():
            reads = ReadBudget(read, steps, interval, "score_only", leads)
            try:
                base = cored(reads, memory, shapes, layers, bits)
            except UserError as error:
                print(f"left out: {said}: {error}", flush=True)
                continue
            for name, score in SCORES.items():
                named = f"{said}, {name}, {bits} bits"
                yield base.model_copy(update={"name": named, "core_score": score})


def table(evaluation: Evaluation, budget: float) -> pd.DataFrame:
    """One row a policy: its score, its reads, and the paired difference to the static core."""
    scores = evaluation.answers.groupby(["policy", "sample"], sort=True)["score"].mean()
    rows = []
    for row in evaluation.summary().to_dict("records"):
        gap = paired_difference(scores[row["policy"]].to_numpy(), scores[STATIC].to_numpy())
        rows.append(
            {
                "budget": budget,
                **{name: row[name] for name in ("policy", "samples", "score", "live_share", "read_share")},
                "vs_static": gap.difference.mean,
                "low": gap.difference.low,
                "high": gap.difference.high,
                "p": gap.p_value,
            }
        )
    return pd.DataFrame(rows)


def when(forced: ForcedSet, memory: float, bits: int) -> Iterator[dict[str, Any]]:
    """KL by the share of steps that refresh, one row a policy; the core is that of every fourth step."""
    layers, steps = len(forced.refreshed(Policy()) or ()), round(forced.answer_tokens)
    reads = ReadBudget(memory / 2, steps, 4, "score_only")
    base = cored(reads, memory, forced.shapes, layers, bits).model_copy(
        update={"core_score": SCORES["scores"]}
    )
    static = kl(forced, base.model_copy(update={"refresh_interval": 0}))
    fixed: list[tuple[str, int, float, dict[str, Any]]]
    fixed = [("fixed", every, 0.0, {"refresh_interval": every}) for every in (1, 2, 3, 4, 6, 8)]
    triggers: list[tuple[str, int, float, dict[str, Any]]]
    triggers = [
        ("triggered", every, margin, {"refresh_interval": every, "refresh_margin": margin})
        for every in (1, 2)
        for margin in (0.05, 0.1, 0.2, 0.4)
    ]
    for kind, every, margin, fields in [*fixed, *triggers]:
        how = "triggered" if kind == "triggered" else "score_only"
        policy = base.model_copy(update={"refresh": how} | fields)
        lengths = [len(answer) - 1 for answer in forced.answers]
        rate = sum(n // every for n in lengths) / sum(lengths)
        if kind == "triggered":
            rate = float(np.mean(forced.refreshed(policy) or 0.0))
        gap = paired_difference(kl(forced, policy), static).difference
        yield {
            "memory": memory,
            "bits": bits,
            "refresh": kind,
            "interval": every,
            "margin": margin,
            "steps": rate,
            "vs_static": gap.mean,
            "low": gap.low,
            "high": gap.high,
        }


def who(
    forced: ForcedSet, memory: float, bits: int, evidence: Evidence, counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """KL of every choice of layers that lead at every step, and what layers share with those they follow."""
    assert evidence.overlap is not None
    layers, steps = evidence.layers, round(forced.answer_tokens)
    static = kl(forced, cored(ReadBudget(memory / 2, steps), memory, forced.shapes, layers, 16))
    for count in counts:
        rows, each = list[dict[str, Any]](), []
        for leads in itertools.combinations(range(layers), count):
            reads = ReadBudget(memory / 2, steps, 1, "score_only", leads)
            policy = cored(reads, memory, forced.shapes, layers, bits)
            each.append(kl(forced, policy.model_copy(update={"core_score": SCORES["scores"]})))
            followed = [(policy.leader(layer), layer) for layer in range(layers)]
            shared = sum(evidence.overlap[lead, layer] for lead, layer in followed if lead is not None)
            gap = paired_difference(each[-1], static).difference
            rows.append(
                {
                    "memory": memory,
                    "bits": bits,
                    "leads": " ".join(map(str, leads)),
                    "overlap": float(shared) / layers,
                    "vs_static": gap.mean,
                    "low": gap.low,
                    "high": gap.high,
                }
            )
        damage = pd.DataFrame(np.array(each).T)
        shared_by = pd.DataFrame([[row["overlap"] for row in rows]] * len(damage))
        print(f"{memory:g}, {bits} bits, {count} lead:", rank_correlation(damage, shared_by), flush=True)
        yield from sorted(rows, key=lambda row: float(row["vs_static"]))


def kl(forced: ForcedSet, policy: Policy) -> NDArray[np.float64]:
    """KL to the dense model (nat per token) of every sample."""
    return np.array([score.kl for score in forced.score(policy)])


def main() -> None:
    """Measure, and write `refresh.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="shapes:describe,read,row")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--budgets", default="0.4,0.2")
    parser.add_argument("--intervals", default="2,4,8")
    parser.add_argument("--run", type=Path, help="a traced run, which says who leads; else no layer does")
    parser.add_argument("--leaders", default="2,3", help="how many layers lead the others")
    parser.add_argument("--leading-intervals", default="1,2")
    parser.add_argument(
        "--only", default="", help="of refreshes, those whose names a regular expression finds"
    )
    parser.add_argument("--steps", type=int, default=17, help="decoding steps that reads are counted over")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--split", default="held-out")
    parser.add_argument("--out", type=Path, default=Path("refresh"))
    parser.add_argument("--when", action="store_true", help="compare when to refresh, by KL")
    parser.add_argument("--who", action="store_true", help="compare who leads, by KL; needs --run")
    given = parser.parse_args()
    if given.who and given.run is None:
        parser.error("--who needs --run, whose overlap of layers is compared")
    loaded, task = avlprof.load_model(given.model), avlprof.load_task(given.task)
    if given.when or given.who:
        limit, scorers = task.max_new_tokens, [ScorerSpec.of(RANKING)]
        samples = task.samples("search", given.samples)
        forced = ForcedSet.prepare(loaded, samples, max_new_tokens=limit, scorers=scorers)
        budgets = map(float, given.budgets.split(","))
        both = [(budget, bits) for budget in budgets for bits in (16, 4)]
        if given.when:
            found = [row for budget, bits in both for row in when(forced, budget, bits)]
        else:
            evidence, counts = Profile.of(RunDirectory(given.run)).evidence(), given.leaders.split(",")
            numbers = [int(count) for count in counts]
            found = [row for budget, bits in both for row in who(forced, budget, bits, evidence, numbers)]
        rows = pd.DataFrame(found)
        print(rows.to_string(index=False, float_format="{:.3f}".format), flush=True)
        given.out.mkdir(parents=True, exist_ok=True)
        rows.to_csv(given.out / ("when.csv" if given.when else "who.csv"), index=False)
        return
    settings = EvaluationSettings(
        split=given.split, samples=given.samples, batch_size=32, fidelity=False, latency=False
    )
    store = AnswerStore(given.out / "answers")
    shapes = shapes_of(evaluate(loaded, task, [], settings, store=store).answers)
    refreshes: dict[str, tuple[int, tuple[int, ...] | None]]
    refreshes = {f"every {every}": (int(every), None) for every in given.intervals.split(",")}
    if given.run is not None:
        evidence = Profile.of(RunDirectory(given.run)).evidence()
        for count in map(int, given.leaders.split(",")):
            leads = leading_layers(evidence, count)
            for every in given.leading_intervals.split(","):
                refreshes[f"every {every}, led by {' '.join(map(str, leads))}"] = int(every), leads
    parts = []
    for budget in map(float, given.budgets.split(",")):
        compared = [
            policy
            for policy in policies(budget, shapes, loaded.adapter.layers, given.steps, refreshes)
            if not policy.name.startswith("every") or re.search(given.only, policy.name)
        ]
        parts.append(table(evaluate(loaded, task, compared, settings, store=store), budget))
        print(parts[-1].to_string(index=False, float_format="{:.3f}".format), flush=True)
    pd.concat(parts, ignore_index=True).to_csv(given.out / "refresh.csv", index=False)


if __name__ == "__main__":
    main()
