"""What halving of batches of trials is worth: the table of docs/tuning.md.

    OMP_NUM_THREADS=1 python -m tools.halving shapes --budgets 0.1,0.2 --seeds 0,1,2 --out halving

The same number of trials, their last third refining layers, one by one and in batches that are halved: CPU
seconds of trials (preparation and probe left out), share of the samples that was scored, KL of the best trial
on the samples of the search, and of its policy on held-out ones. Finished rows of `halving.csv` are kept.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from optuna.trial import TrialState

import avlprof
from avlprof.models import LoadedModel
from avlprof.policy import parse_policy
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Task
from avlprof.tuning import Settings
from avlprof.tuning.evidence import probed
from avlprof.tuning.prepared import Prepared, prepare
from avlprof.tuning.refine import refine
from avlprof.tuning.storages._base import trials_in
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.study import finalists
from avlprof.tuning.trials import run_trials


def searched(prepared: Prepared, settings: Settings, budget: float, folder: Path) -> dict[str, object]:
    """The trials of one study, and what they took and gave."""
    objective = prepared.objective(folder, settings.space, prepared.budget(budget, None))
    prepared.forced.score(
        objective.space.starts()[0].policy(objective.evidence, objective.budget)
    )  # dense rows
    began = time.process_time()
    scalars = replace(settings, trials=settings.trials - settings.refining, refine=0)
    studies = [run_trials(FolderStorage(folder), scalars, objective)]
    if settings.refining:
        studies.append(refine(folder, settings, objective, finalists(studies[0], 1)[0]))
    seconds = time.process_time() - began
    best = finalists(studies[0], 1, *studies[1:])[0]
    seen = [
        trial.user_attrs["samples"] for study in studies for trial in trials_in(study, TrialState.COMPLETE)
    ]
    return {
        "cpu_s": seconds,
        "scored": sum(seen) / len(seen) / len(prepared.samples),
        "best": best.value,
        "policy": best.user_attrs["policy"],
    }


def held_out(loaded: LoadedModel, task: Task, samples: int) -> ForcedSet:
    """Samples that no trial saw."""
    return ForcedSet.prepare(loaded, task.samples("held-out", samples), max_new_tokens=task.max_new_tokens)


def main() -> None:
    """Measure, and write `halving.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="shapes")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--budgets", default="0.1,0.2")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--samples", type=int, default=64, help="of the search split")
    parser.add_argument("--others", type=int, default=128, help="held-out samples")
    parser.add_argument("--out", type=Path, default=Path("halving"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    loaded, task = avlprof.load_model(given.model), avlprof.load_task(given.task)
    profile, others = (
        avlprof.trace(loaded, task, 32, out=given.out / "run").profile(),
        held_out(loaded, task, given.others),
    )
    ways = [int(size) for size in given.batches.split(",")]
    made: dict[bool, Prepared] = {}
    for halves in {size > 1 for size in ways}:
        settings = Settings(samples=given.samples, halving=8 if halves else 1)
        ready = prepare(loaded, task, profile, settings)
        evidence = probed(ready.evidence, ready.forced, given.out / "probe.json", bits=True)
        made[halves] = ready.with_evidence(evidence)
    path = given.out / "halving.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    keys = ("seed", "budget", "batch")
    for seed in map(int, given.seeds.split(",")):
        for budget in map(float, given.budgets.split(",")):
            for size in ways:
                if any(tuple(row[key] for key in keys) == (seed, budget, size) for row in rows):
                    continue
                settings = Settings(trials=given.trials, samples=given.samples, seed=seed, halving=size)
                with tempfile.TemporaryDirectory() as folder:
                    found = searched(made[size > 1], settings, budget, Path(folder))
                scores = others.score(parse_policy(str(found.pop("policy")), "best"))
                found["others"] = float(np.mean([score.kl for score in scores]))
                rows.append(dict(zip(keys, (seed, budget, size), strict=True)) | found)
                pd.DataFrame(rows).to_csv(path, index=False)
                print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)


if __name__ == "__main__":
    main()
