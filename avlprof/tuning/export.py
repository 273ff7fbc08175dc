"""Pick a policy from a study: the proved winner, a trial, or the best within a share of reads."""

from __future__ import annotations

import math
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.policy import Policy, Provenance, load_policy, parse_policy
from avlprof.tuning.finalists import finalists
from avlprof.tuning.storage import StudyMeta, read_meta, read_study
from avlprof.versions import __version__, versions


def export_policy(folder: Path, trial: int | None = None, max_read: float | None = None) -> Policy:
    """A policy of a study.

    Without options it is the winner that was proved on held-out samples, or the best trial when
    the study was stopped before the proof. `trial` takes that trial's policy; `max_read` the best
    fully scored one whose mean reads per step are at most that share of the dense prompt KV (a
    point of the front of quality against reads).

    Raises:
        UserError: no such study or trial, no trial reads so little, or both options are given.
    """
    if trial is not None and max_read is not None:
        raise UserError("give --trial or --max-read, not both")
    if max_read is not None and not 0.0 <= max_read <= 1.0:
        raise UserError(f"max_read must be in [0, 1], a share of the dense prompt KV, got {max_read}")
    meta = read_meta(folder)
    if trial is None and max_read is None and (folder / "policy.yaml").exists():
        return load_policy(folder / "policy.yaml")
    study = read_study(folder)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if trial is not None:
        found = next((t for t in done if t.number == trial), None)
        if found is None:
            raise UserError(
                f"study {folder} has no finished trial {trial}; the {len(done)} finished ones are below "
                f"{1 + max((t.number for t in done), default=-1)}"
            )
        return _policy(found, meta, folder)
    ranked = finalists(study, len(done))
    if max_read is not None:
        ranked = [t for t in ranked if t.user_attrs["read_share"] <= max_read]
        if not ranked:
            least = min(t.user_attrs["read_share"] for t in finalists(study, len(done)))
            enough = math.ceil(least * 1000) / 1000
            raise UserError(f"no trial of {folder} reads {max_read:g} or less; the least is {enough:g}")
    return _policy(ranked[0], meta, folder)


def _policy(trial: FrozenTrial, meta: StudyMeta, folder: Path) -> Policy:
    policy = parse_policy(trial.user_attrs["policy"], f"trial {trial.number} of {folder}")
    name, scored = folder.resolve().name, trial.user_attrs["samples"]
    return policy.model_copy(
        update={
            "name": f"{name}-trial-{trial.number}",
            "provenance": Provenance(
                made_by=f"avlprof export {__version__}",
                model=meta.model,
                model_revision=meta.model_hash,
                model_hash=meta.model_hash,
                versions=versions(),
                task=meta.task,
                samples=scored,
                seed=meta.seed,
                run_hash=meta.run_hash,
                study=name,
                trial=trial.number,
                budget=meta.budget,
                read_budget=meta.read_budget,
                measured_budget=round(trial.user_attrs["live_share"], 6),
                measured_read_budget=round(trial.user_attrs["read_share"], 6),
                notes=f"KL to dense {trial.value:.4f} nat per token on {scored} of {meta.samples} samples of "
                f"split '{meta.split}'; not proved on held-out samples",
            ),
        }
    )
