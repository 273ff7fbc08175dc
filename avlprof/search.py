"""`avlprof.tune`: the search with everything it needs found or made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from avlprof.api import trace
from avlprof.errors import UserError
from avlprof.models import LoadedModel, load_model
from avlprof.tasks import Task, load_task
from avlprof.traced import RUNS, Run, latest_run
from avlprof.tuning import Settings, Space, Tuned, read_meta
from avlprof.tuning import tune as search

if TYPE_CHECKING:
    import optuna

STUDIES = Path("studies")
TRACED_SAMPLES = 32
Progress = Callable[[str, int, int], None]


def tune(
    model: str | LoadedModel = "tiny",
    task: str | Task = "shapes",
    *,
    budget: float = 0.2,
    read_budget: float | None = None,
    trials: int = 50,
    samples: int = 64,
    proof_samples: int = 100,
    seed: int = 0,
    run: Run | Path | str | None = None,
    out: Path | str | None = None,
    max_new_tokens: int | None = None,
    prune: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    space: Space | None = None,
    progress: Progress | None = None,
    on_trial: Callable[[optuna.Study, optuna.trial.FrozenTrial], None] | None = None,
) -> Tuned:
    """Find the best policy at a budget of prompt KV and prove it; the same call resumes.

    Args:
        model: alias, hub id, local folder, or a loaded model.
        task: what `avlprof.tasks.load_task` takes, or a task.
        budget: prompt KV live after prefill over dense, in [0, 1].
        read_budget: mean prompt KV read per decoding step over dense; with it, compute shares
            and refresh interval are tuned as well.
        trials: trials of the study in all.
        samples: samples of the search split that a trial is scored on.
        proof_samples: held-out samples of the final comparison.
        run: the traced run whose profile shapes the policies; by default that of the study in
            `out`, else the newest below `runs/` of this model and task, or one is made.
        out: folder of the study; by default one below `studies/` named after what it searches.
        progress: called with the name of a phase, units done and units in all.
        on_trial: called with study and trial after each trial.

    Raises:
        UserError: an infeasible budget, a run of another model, or a folder of another study.
    """
    chosen = load_task(task) if isinstance(task, str) else task
    settings = Settings(
        budget=budget,
        read_budget=read_budget,
        trials=trials,
        samples=samples,
        proof_samples=proof_samples,
        seed=seed,
        prune=prune,
        max_new_tokens=max_new_tokens,
    )
    loaded = (
        model
        if isinstance(model, LoadedModel)
        else load_model(
            model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
    )
    folder = Path(out) if out is not None else STUDIES / study_name(loaded, chosen, settings)
    traced = _run(run, folder, loaded, chosen, max_new_tokens, progress)
    traced.check_model(loaded)
    return search(
        loaded, chosen, traced.profile(), folder, settings, space=space, progress=progress, on_trial=on_trial
    )


def study_name(loaded: LoadedModel, task: Task, settings: Settings) -> str:
    """`<model>-<task>-b<budget>`, with the read budget and the seed where they are not the default."""
    parts = [Path(loaded.name).name, task.name, f"b{settings.budget:g}"]
    if settings.read_budget is not None:
        parts.append(f"r{settings.read_budget:g}")
    if settings.seed:
        parts.append(f"s{settings.seed}")
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def _run(
    run: Run | Path | str | None,
    folder: Path,
    loaded: LoadedModel,
    task: Task,
    max_new_tokens: int | None,
    progress: Progress | None,
) -> Run:
    if isinstance(run, Run):
        return run
    if run is not None:
        return Run.open(run)
    known = _run_of_study(folder) or latest_run(loaded=loaded, task=task.name)
    if known is not None:
        return known
    tell = None if progress is None else (lambda done, total: progress("trace", done, total))
    few = len(task.samples("search", TRACED_SAMPLES))
    return trace(loaded, task, few, max_new_tokens=max_new_tokens, progress=tell)


def _run_of_study(folder: Path) -> Run | None:
    """The run below `runs/` that the study in a folder was begun with, if both are there."""
    if not (folder / "study.json").is_file():
        return None
    wanted = read_meta(folder).run_hash
    for path in sorted(RUNS.glob("*/meta.json")):
        with contextlib.suppress(UserError):
            run = Run.open(path.parent)
            if run.directory.hash == wanted:
                return run
    return None
