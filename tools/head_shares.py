"""What a search gains by moving the share of every KV head: the second table of heads in docs/tuning.md.

    OMP_NUM_THREADS=1 python -m tools.head_shares shapes --budgets 0.1,0.2 --seeds 0,1 --out head-shares

At each budget and seed a study of scalars and layers (`--trials`, a third of them layer by layer), then
`--moves` trials head by head, and beside them as many more layer by layer. Judged by the KL to dense on the
samples of the search and on held-out ones, paired with the study's own best. The same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import avlprof
from avlprof import Settings, Space, TraceSettings
from avlprof.evaluation import paired_difference
from avlprof.policy import Policy, parse_policy
from avlprof.runtime.forced import ForcedSet
from avlprof.tracing import RecordOptions
from avlprof.tuning.prepared import Prepared, prepare
from avlprof.tuning.refine import refine
from avlprof.tuning.study import finalists
from avlprof.tuning.tune import search

TRACED = 32


def found(
    prepared: Prepared, folder: Path, budget: float, settings: Settings, space: Space
) -> dict[str, Policy]:
    """The best policy before heads are moved, after it, and after as many more trials of layers."""
    done = search(prepared, folder, budget, settings)
    before = finalists(done.study, 1, *([done.refined] if done.refined else []))[0]
    policies = {"scalars, then layers": before}
    if done.headed is None:
        return {name: parse_policy(trial.user_attrs["policy"], name) for name, trial in policies.items()}
    longer = Settings(
        **vars(settings) | {"refine": settings.refining + settings.refine_heads, "refine_heads": 0}
    )
    objective = done.prepared.objective(folder, space, done.budget)
    more = refine(folder / "longer", longer, objective, finalists(done.study, 1)[0])
    policies["then heads"] = finalists(done.headed, 1)[0]
    policies["then more layers"] = min(finalists(more, 1)[0], before, key=lambda trial: trial.value or 0.0)
    return {name: parse_policy(trial.user_attrs["policy"], name) for name, trial in policies.items()}


def rows(policies: dict[str, Policy], forced: ForcedSet, split: str) -> list[dict[str, object]]:
    """Mean KL of each policy, and its paired difference to the first."""
    kl = [np.array([score.kl for score in own]) for own in forced.score_many(list(policies.values()))]
    told = []
    for (name, policy), values in zip(policies.items(), kl, strict=True):
        gap = paired_difference(values, kl[0]).difference
        heads = policy.heads if policy.heads != "adaptive" else f"adaptive {policy.head_floor:g}"
        told.append(
            {
                "split": split,
                "samples": len(values),
                "policy": name,
                "heads": heads,
                "KL": values.mean(),
                "change": gap.mean,
                "low": gap.low,
                "high": gap.high,
            }
        )
    return told


def main() -> None:
    """Search, measure, and write `head-shares.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="shapes")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--budgets", default="0.1,0.2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--bits", default="16,8,4,3,2")
    parser.add_argument("--text-bits", default="16,8,4,3")
    parser.add_argument("--samples", type=int, default=64, help="of the search split")
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--trials", type=int, default=60, help="of scalars and layers")
    parser.add_argument("--moves", type=int, default=30, help="trials that move heads")
    parser.add_argument("--out", type=Path, default=Path("head-shares"))
    given = parser.parse_args()
    loaded, task = avlprof.load_model(given.model), avlprof.load_task(given.task)
    by_head = TraceSettings(record=RecordOptions(per_head=True))
    profile = avlprof.trace(loaded, task, TRACED, by_head, out=given.out / "run").profile()
    bits, text_bits = (tuple(map(int, text.split(","))) for text in (given.bits, given.text_bits))
    space = Space(bits=bits, text_bits=text_bits)
    unseen, parts = None, []
    for seed in map(int, given.seeds.split(",")):
        settings = Settings(
            trials=given.trials + given.moves, refine=given.trials // 3, refine_heads=given.moves,
            samples=given.samples, finalists=1, seed=seed, space=space,
        )  # fmt: skip
        prepared = prepare(loaded, task, profile, settings)
        unseen = unseen or ForcedSet.prepare(
            loaded,
            task.samples("held-out", given.held_out),
            max_new_tokens=task.max_new_tokens,
            scorers=[avlprof.policy.ScorerSpec.of(name) for name in space.scorers],
        )
        for budget in map(float, given.budgets.split(",")):
            folder = given.out / f"b{budget:g}-s{seed}"
            policies = found(prepared, folder, budget, settings, space)
            own = rows(policies, prepared.forced, "search") + rows(policies, unseen, "held-out")
            parts.append(pd.DataFrame([{"budget": budget, "seed": seed} | row for row in own]))
            print(parts[-1].to_string(index=False, float_format="{:.4f}".format), flush=True)
    pd.concat(parts, ignore_index=True).to_csv(given.out / "head-shares.csv", index=False)


if __name__ == "__main__":
    main()
