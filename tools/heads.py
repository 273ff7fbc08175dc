"""What it is worth that KV heads have sets, or counts, of their own: the table of docs/tuning.md.

    OMP_NUM_THREADS=1 python -m tools.heads shapes --budgets 0.1,0.2,0.4 --bits 16,4 --out heads

At each budget and precision the same kept share in every layer and one ranking: one set a layer, one for each
KV head, and counts that differ by head with floors of several sizes. Judged by the KL to dense on the search
split, and with `--answers N` by answers to N held-out samples too. Finished answers are kept in the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import avlprof
from avlprof.budgets import meet_budget
from avlprof.evaluation import AnswerStore, paired_difference
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.models import LoadedModel
from avlprof.policy import Policy, PromptShape, ScorerSpec
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Task

BASE = "kv_head"
KINDS: dict[str, dict[str, object]] = {
    "shared": {},
    "kv_head": {"heads": "kv_head"},
    **{f"adaptive {floor:g}": {"heads": "adaptive", "head_floor": floor} for floor in (0.0, 0.2, 0.5)},
}


def policies(
    budget: float, bits: int, shapes: Sequence[PromptShape], layers: int, scorer: ScorerSpec
) -> Iterator[Policy]:
    """One policy of each kind of heads at a budget."""
    keep = meet_budget((1.0,) * layers, shapes, budget, bits=bits)
    flat = Policy(vision_keep=keep, vision_bits=bits, scorer=scorer)
    if min(keep) < 1.0:
        for name, update in KINDS.items():
            yield flat.model_copy(update={"name": name} | update)


def row(name: str, values: np.ndarray, base: np.ndarray) -> dict[str, object]:
    """The mean of a policy's scores, and their paired difference to those of `BASE`."""
    gap = paired_difference(values, base)
    return {
        "heads": name,
        "samples": len(values),
        "mean": values.mean(),
        "vs_kv_head": gap.difference.mean,
        "low": gap.difference.low,
        "high": gap.difference.high,
    }


def table(found: dict[str, np.ndarray], about: dict[str, object]) -> pd.DataFrame:
    """One row a kind of heads."""
    return pd.DataFrame([about | row(name, values, found[BASE]) for name, values in found.items()])


def answered(
    loaded: LoadedModel, task: Task, kinds: Sequence[Policy], samples: int, store: AnswerStore
) -> dict[str, np.ndarray]:
    """The task's metric by policy, on held-out samples."""
    settings = EvaluationSettings(
        split="held-out", samples=samples, batch_size=32, fidelity=False, latency=False
    )
    answers = evaluate(loaded, task, kinds, settings, store=store).answers
    scores = answers.groupby(["policy", "sample"], sort=True)["score"].mean()
    return {kind.name: scores[kind.name].to_numpy() for kind in kinds}


def main() -> None:
    """Measure, and write `heads.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="shapes")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--budgets", default="0.1,0.2,0.4")
    parser.add_argument("--bits", default="16,4")
    parser.add_argument("--scorer", default="valued:instruction")
    parser.add_argument("--samples", type=int, default=240, help="of the search split")
    parser.add_argument("--answers", type=int, default=0, help="held-out samples that are answered")
    parser.add_argument("--out", type=Path, default=Path("heads"))
    given = parser.parse_args()
    loaded, task = avlprof.load_model(given.model), avlprof.load_task(given.task)
    scorer = ScorerSpec.of(given.scorer)
    samples = task.samples("search", given.samples)
    forced = ForcedSet.prepare(loaded, samples, max_new_tokens=task.max_new_tokens, scorers=[scorer])
    store, parts = AnswerStore(given.out / "answers"), []
    for bits in map(int, given.bits.split(",")):
        for budget in map(float, given.budgets.split(",")):
            kinds = list(policies(budget, bits, forced.shapes, loaded.adapter.layers, scorer))
            if not kinds:
                continue  # all vision fits
            about: dict[str, object] = {"budget": budget, "bits": bits}
            scores = forced.score_many(kinds)
            kl = {
                kind.name: np.array([score.kl for score in own])
                for kind, own in zip(kinds, scores, strict=True)
            }
            parts.append(table(kl, about | {"judged": "KL"}))
            if given.answers:
                found = answered(loaded, task, kinds, given.answers, store)
                parts.append(table(found, about | {"judged": task.metric}))
                print(parts[-2].to_string(index=False, float_format="{:.4f}".format), flush=True)
            print(parts[-1].to_string(index=False, float_format="{:.4f}".format), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    pd.concat(parts, ignore_index=True).to_csv(given.out / "heads.csv", index=False)


if __name__ == "__main__":
    main()
