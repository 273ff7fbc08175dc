"""What a refresh is worth at a read budget: the table of docs/tuning.md.

    OMP_NUM_THREADS=1 python -m tools.refresh shapes:describe,read,row --budgets 0.4,0.2 --out refresh

At each memory budget, with reads of half of it and one ranking: the core of the prompt that is never picked
anew, cores picked by the refresh's row alone and by running scores, the same with what is not core in 4
bits, and in 4 bits no core at all. Shares are even over layers. Finished answers are kept in the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

import avlprof
from avlprof.budgets import ReadBudget, meet_both, meet_budget
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore, Evaluation, paired_difference
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.policy import RANKING, CoreScore, Policy, PromptShape, ScorerSpec
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
        vision_bits=bits,
        scorer=ScorerSpec.of(RANKING),
    )


def policies(
    memory: float, shapes: Sequence[PromptShape], layers: int, steps: int, intervals: Sequence[int]
) -> Iterator[Policy]:
    """Who is compared at a memory budget; what its reads do not allow is left out, with a line."""
    even, read = (1.0,) * layers, memory / 2
    yield cored(ReadBudget(read, steps), memory, shapes, layers, 16).model_copy(update={"name": STATIC})
    keep = meet_budget(even, shapes, read, bits=4)
    yield Policy(name="no core, 4 bits", vision_keep=keep, vision_bits=4, scorer=ScorerSpec.of(RANKING))
    for bits in (16, 4):
        for interval in intervals:
            reads = ReadBudget(read, steps, interval, "score_only")
            try:
                base = cored(reads, memory, shapes, layers, bits)
            except UserError as error:
                print(f"left out: {error}", flush=True)
                continue
            for name, score in SCORES.items():
                named = f"every {interval}, {name}, {bits} bits"
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


def main() -> None:
    """Measure, and write `refresh.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="shapes:describe,read,row")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--budgets", default="0.4,0.2")
    parser.add_argument("--intervals", default="2,4,8")
    parser.add_argument("--steps", type=int, default=17, help="decoding steps that reads are counted over")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--split", default="held-out")
    parser.add_argument("--out", type=Path, default=Path("refresh"))
    given = parser.parse_args()
    loaded, task = avlprof.load_model(given.model), avlprof.load_task(given.task)
    settings = EvaluationSettings(
        split=given.split, samples=given.samples, batch_size=32, fidelity=False, latency=False
    )
    store = AnswerStore(given.out / "answers")
    shapes = shapes_of(evaluate(loaded, task, [], settings, store=store).answers)
    intervals = [int(interval) for interval in given.intervals.split(",")]
    parts = []
    for budget in map(float, given.budgets.split(",")):
        compared = list(policies(budget, shapes, loaded.adapter.layers, given.steps, intervals))
        parts.append(table(evaluate(loaded, task, compared, settings, store=store), budget))
        print(parts[-1].to_string(index=False, float_format="{:.3f}".format), flush=True)
    pd.concat(parts, ignore_index=True).to_csv(given.out / "refresh.csv", index=False)


if __name__ == "__main__":
    main()
