"""Which ranking of vision tokens wins at equal bytes: the table of docs/policies.md.

    OMP_NUM_THREADS=1 python -m tools.ranking shapes --budgets 0.1,0.2,0.4 --samples 240 --out ranking

The same kept share in every layer, one scorer after another, on the same samples of a task; `random` with
three seeds. Finished answers are kept in the folder, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import avlprof
from avlprof.budgets import scale_to
from avlprof.evaluation import AnswerStore, Evaluation, paired_difference
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.models import LoadedModel
from avlprof.policy import Policy, PromptShape, ScorerSpec
from avlprof.tasks import Task

SCORERS = (
    *("last_query", "instruction", "window", "text_weighted", "accumulated"),
    *("valued:last_query", "valued:instruction", "valued:text_weighted"),
    *("pooled:window", "pooled:instruction"),
    *("key_norm", "key_diversity", "value_norm", "position", "random"),
)


def flat(name: str) -> Policy:
    """A fifth of the vision KV in every layer, ranked by `scorer` or `scorer:of`."""
    outer, _, inner = name.partition(":")
    scorer = ScorerSpec(name=outer, options={"of": inner} if inner else {})
    return Policy(name=name, vision_keep=0.2, scorer=scorer)


def shapes_of(answers: pd.DataFrame) -> list[PromptShape]:
    """Token counts of the prompts that the dense model answered."""
    dense = answers[answers["policy"] == "dense"]
    rows = dense[["system", "vision", "text"]].itertuples(index=False)
    return [PromptShape(int(system), int(vision), int(text)) for system, vision, text in rows]


def measure(
    loaded: LoadedModel,
    task: Task,
    budget: float,
    names: Sequence[str],
    settings: EvaluationSettings,
    store: AnswerStore,
) -> pd.DataFrame:
    """One row a scorer, best first: score with its interval, and the paired difference to random."""
    dense = evaluate(loaded, task, [], settings, store=store)
    shapes = shapes_of(dense.answers)
    policies = [scale_to(flat(name), budget, shapes, loaded.adapter.layers) for name in names]
    return table(evaluate(loaded, task, policies, settings, store=store), budget)


def table(evaluation: Evaluation, budget: float) -> pd.DataFrame:
    """The rows of one budget: `budget, scorer, n, score, low, high, vs_random*`, best first."""
    scores = evaluation.answers.groupby(["policy", "sample"], sort=True)["score"].mean()
    by_chance = scores["random x3"].to_numpy()
    rows = []
    for row in evaluation.summary().to_dict("records"):
        gap = paired_difference(scores[row["policy"]].to_numpy(), by_chance)
        rows.append(
            {
                "budget": budget,
                "scorer": row["policy"],
                "n": row["samples"],
                **{name: row[name] for name in ("score", "low", "high", "live_share")},
                "vs_random": gap.difference.mean,
                "vs_random_low": gap.difference.low,
                "vs_random_high": gap.difference.high,
            }
        )
    return pd.DataFrame(rows).sort_values("score", ascending=False, kind="stable")


def markdown(frame: pd.DataFrame) -> str:
    """One line a scorer, one column a budget, best mean over the budgets first."""
    budgets = sorted(frame["budget"].unique())
    lines = [
        "| scorer | " + " | ".join(f"{b:.0%}" for b in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name in frame.groupby("scorer")["score"].mean().sort_values(ascending=False).index:
        own = frame[frame["scorer"] == name].set_index("budget")
        cells = [f"{own.score[b]:.3f} [{own.low[b]:.3f}, {own.high[b]:.3f}]" for b in budgets]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write `ranking.csv` and `ranking.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="shapes")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--budgets", default="0.1,0.2,0.4")
    parser.add_argument("--scorers", default=",".join(SCORERS), help="random is among them in any case")
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--split", default="held-out")
    parser.add_argument("--out", type=Path, default=Path("ranking"))
    given = parser.parse_args()
    loaded, task = avlprof.load_model(given.model), avlprof.load_task(given.task)
    settings = EvaluationSettings(
        split=given.split, samples=given.samples, batch_size=32, fidelity=False, latency=False
    )
    store = AnswerStore(given.out / "answers")
    names = list(dict.fromkeys([*given.scorers.split(","), "random"]))
    parts = []
    for budget in map(float, given.budgets.split(",")):
        parts.append(measure(loaded, task, budget, names, settings, store))
        print(parts[-1].to_string(index=False, float_format="{:.3f}".format), flush=True)
    frame = pd.concat(parts, ignore_index=True)
    frame.to_csv(given.out / "ranking.csv", index=False)
    (given.out / "ranking.md").write_text(markdown(frame) + "\n", encoding="utf-8")
    print(markdown(frame))


if __name__ == "__main__":
    main()
