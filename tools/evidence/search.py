"""The trials of a sweep without its proofs: forced scores alone, in the folders that `sweep` goes on with.

Generating answers takes most of the time of a study on a slow machine. What is compared on held-out
samples by KL needs none, so the trials of all budgets come first, and the proofs when there is time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlprof import Policy, Settings, load_policy, save_policy
from avlprof.allocators import Evidence
from avlprof.analysis import Profile
from avlprof.locks import FolderLock
from avlprof.models import LoadedModel
from avlprof.policy import FULL, parse_policy
from avlprof.tasks import Task
from avlprof.tuning import Candidate, Workers
from avlprof.tuning.evidence import probed, shared_evidence
from avlprof.tuning.prepared import Prepared, prepare
from avlprof.tuning.refine import refine
from avlprof.tuning.study import claim_study, finalists, study_meta
from avlprof.tuning.workers import run_workers
from avlprof.watch import Part, Watch

FOUND = "searched.yaml"
"""The best policy of a study's trials, in its folder; the proof's winner is in `policy.yaml`."""


def best_known(folder: Path) -> Policy | None:
    """The winner of a study's proof, else of its trials; None before they are done."""
    path = next((folder / name for name in ("policy.yaml", FOUND) if (folder / name).exists()), None)
    return load_policy(path) if path else None


def search(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    budgets: Sequence[float],
    settings: Settings,
    watch: Watch,
) -> None:
    """Run the trials at every budget that has no winner yet, each started from the one below it."""
    if all(best_known(folder / f"b{budget:g}") for budget in budgets):
        return
    prepared, start = prepare(loaded, task, profile, settings, watch), list[Candidate]()
    for budget in sorted(budgets):
        watch.budget(budget)
        start = [_search_at(prepared, folder, budget, settings, start, watch)]


def _search_at(
    prepared: Prepared,
    folder: Path,
    memory: float,
    settings: Settings,
    starts: Sequence[Candidate],
    watch: Watch,
) -> Candidate:
    """The best scalars at a budget; the best policy, refined or not, is written."""
    own = folder / f"b{memory:g}"
    storage = Workers().open(own)
    budget = prepared.budget(memory, settings.read_budget)

    def measured() -> Evidence:
        bits = settings.space.bits != (FULL,)
        return probed(prepared.evidence, prepared.forced, folder / "probe.json", watch, bits=bits)

    lock = FolderLock(own)
    try:
        claim_study(storage, study_meta(prepared.loaded, prepared.task, prepared.run_hash, memory, settings))
        prepared = prepared.with_evidence(shared_evidence(storage, measured))
        objective = prepared.objective(own, settings.space, budget, starts)
        scalar = settings.trials - settings.refining
        alone = Settings(**{**vars(settings), "trials": scalar, "refine": 0})
        study = run_workers(Workers(), storage, alone, objective, Part(watch, "trials", 0, settings.trials))
        more = []
        if settings.refining:
            part = Part(watch, "trials", scalar, settings.trials)
            more = [refine(own, settings, objective, finalists(study, 1)[0], part)]
        best = finalists(study, 1, *more)[0]
        policy = parse_policy(best.user_attrs["policy"], f"trial {best.number} of {own}")
        save_policy(policy, own / FOUND)
    finally:
        lock.release()
    return Candidate.of(finalists(study, 1)[0].params)
