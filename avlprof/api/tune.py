"""`avlprof.tune` and its kin: the search with everything it needs found or made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avlprof.api.trace import trace
from avlprof.errors import UserError
from avlprof.models import LoadedModel, load_model
from avlprof.run import RUNS, Run, latest_run
from avlprof.tasks import Task, load_task
from avlprof.tracing.options import TraceSettings
from avlprof.tuning import Settings, Smallest, Space, Sweep, Tuned, read_meta
from avlprof.tuning.smallest import smallest as run_smallest
from avlprof.tuning.study import check_folder, model_of
from avlprof.tuning.sweep import sweep as run_sweep
from avlprof.tuning.tune import tune as run_study
from avlprof.tuning.workers import Crew

if TYPE_CHECKING:
    from avlprof.tuning.tune import OnTrial


STUDIES = Path("studies")
TRACED_SAMPLES = 32
Progress = Callable[[str, int, int], None]


def tune(
    model: str | LoadedModel = "tiny",
    task: str | Task = "shapes",
    *,
    budget: float = 0.2,
    read_budget: float | None = None,
    objective: str = "fidelity",
    sampler: str = "tpe",
    trials: int = 50,
    refine: int | None = None,
    samples: int = 64,
    proof_samples: int = 100,
    margin: float = 0.02,
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
    on_trial: OnTrial | None = None,
    told: Callable[[str], None] | None = None,
    workers: int = 1,
    storage: str | None = None,
) -> Tuned:
    """Find the best policy at a budget of prompt KV and prove it; the same call resumes.

    Args:
        model: alias, hub id, local folder, or a loaded model.
        task: what `avlprof.tasks.load_task` takes, or a task.
        budget: prompt KV live after prefill over dense, in [0, 1].
        read_budget: mean prompt KV read per decoding step over dense; with it, compute shares
            and refresh interval are tuned as well.
        objective: what trials are scored by: `fidelity` (KL to the dense model on its own answers),
            `likelihood` (of the references) or `accuracy` (the task's metric on generated answers).
        sampler: who proposes trials: `tpe`, `gp`, `cmaes` or `random`.
        trials: trials of the study in all.
        refine: how many of them refine the best scalars layer by layer; a third unless told.
        samples: samples of the search split that a trial is scored on.
        proof_samples: held-out samples of the final comparison.
        margin: loss of the metric that still counts as not inferior to the strongest rival.
        run: the traced run whose profile shapes the policies; by default that of the study in
            `out`, else the newest below `runs/` of this model and task, or one is made.
        out: folder of the study; by default one below `studies/` named after what it searches.
        progress: called with the name of a phase, units done and units in all.
        on_trial: called with study and trial after each trial.
        told: called with sentences for the reader.
        workers: processes on this machine that run trials, this one included; with more than one
            model and task are given by name.
        storage: PostgreSQL URL for the trials, to work on several machines; a journal file by default.

    Raises:
        UserError: an infeasible budget, a run of another model, or a folder of another study.
    """
    settings = Settings(
        budget=budget, read_budget=read_budget, trials=trials, refine=refine, samples=samples,
        proof_samples=proof_samples, margin=margin, objective=objective, sampler=sampler, seed=seed,
        prune=prune, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    asked = _asked(model, task, device, dtype, revision, trust_remote_code)
    folder = _folder(out, asked, settings, f"b{budget:g}")
    profile = asked.run(run, folder, max_new_tokens, progress).profile()
    return run_study(
        asked.loaded, asked.task, profile, folder, settings,
        space=space, progress=progress, on_trial=on_trial, told=told, crew=asked.crew(workers, storage),
    )  # fmt: skip


def sweep(
    model: str | LoadedModel = "tiny",
    task: str | Task = "shapes",
    budgets: Sequence[float] = (0.1, 0.2, 0.4),
    settings: Settings | None = None,
    *,
    run: Run | Path | str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    space: Space | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
    on_budget: Callable[[float], None] | None = None,
    told: Callable[[str], None] | None = None,
    workers: int = 1,
    storage: str | None = None,
) -> Sweep:
    """Tune and prove at several budgets, each started from its neighbour's best; resumes.

    Args:
        budgets: shares of the dense prompt KV in memory after prefill.
        settings: everything else about the search; its own budget does not count.
        on_budget: called with each budget before its study.

    The other arguments are those of `tune`.

    Raises:
        UserError: as `tune`.
    """
    settings = settings or Settings()
    asked = _asked(model, task, device, dtype, revision, trust_remote_code)
    folder = _folder(out, asked, settings, "sweep")
    profile = asked.run(run, folder, settings.max_new_tokens, progress).profile()
    return run_sweep(
        asked.loaded, asked.task, profile, folder, budgets, settings,
        space=space, progress=progress, on_trial=on_trial, on_budget=on_budget, told=told,
        crew=asked.crew(workers, storage),
    )  # fmt: skip


def smallest(
    model: str | LoadedModel = "tiny",
    task: str | Task = "shapes",
    max_drop: float = 0.01,
    settings: Settings | None = None,
    *,
    run: Run | Path | str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    space: Space | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
    on_budget: Callable[[float], None] | None = None,
    told: Callable[[str], None] | None = None,
    workers: int = 1,
    storage: str | None = None,
) -> Smallest:
    """Find the smallest budget whose tuned policy loses at most `max_drop` of the metric; resumes.

    Budgets are judged on the search split, and the one that is found is tested on held-out samples,
    once. The other arguments are those of `sweep`.

    Raises:
        UserError: as `tune`, or no budget holds the drop.
    """
    settings = settings or Settings()
    asked = _asked(model, task, device, dtype, revision, trust_remote_code)
    folder = _folder(out, asked, settings, f"drop{max_drop:g}")
    profile = asked.run(run, folder, settings.max_new_tokens, progress).profile()
    return run_smallest(
        asked.loaded, asked.task, profile, folder, max_drop, settings,
        space=space, progress=progress, on_trial=on_trial, on_budget=on_budget, told=told,
        crew=asked.crew(workers, storage),
    )  # fmt: skip


def study_name(loaded: LoadedModel, task: Task, settings: Settings, what: str | None = None) -> str:
    """`<model>-<task>-b<budget>`, with the read budget, objective, sampler and seed that are not default.

    `what` takes the place of the budget.
    """
    parts = [Path(loaded.name).name, task.name, what or f"b{settings.budget:g}"]
    if settings.read_budget is not None:
        parts.append(f"r{settings.read_budget:g}")
    usual = Settings()
    parts += [
        value
        for value, default in ((settings.objective, usual.objective), (settings.sampler, usual.sampler))
        if value != default
    ]
    if settings.seed:
        parts.append(f"s{settings.seed}")
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


@dataclass(frozen=True)
class _Asked:
    """A loaded model and a task."""

    loaded: LoadedModel
    task: Task
    named: dict[str, Any] | None = None  # by what further workers load them

    def crew(self, workers: int, storage: str | None) -> Crew:
        """Who works on the studies."""
        if self.named is None:
            if workers > 1:
                raise UserError("several workers load model and task by themselves; give both by name")
            return Crew(workers, storage)
        return Crew(workers, storage, **self.named)

    def run(
        self,
        given: Run | Path | str | None,
        folder: Path,
        max_new_tokens: int | None,
        progress: Progress | None,
    ) -> Run:
        """The run to take the profile from, of this model; traced here when there is none."""
        found = given if isinstance(given, Run) else Run.open(given) if given is not None else None
        found = (
            found or _run_of_study(folder, self.loaded) or latest_run(loaded=self.loaded, task=self.task.name)
        )
        if found is None:
            few = len(self.task.samples("search", TRACED_SAMPLES))
            found = trace(self.loaded, self.task, few, TraceSettings(max_new_tokens=max_new_tokens))
        found.check_model(self.loaded)
        return found


def _asked(
    model: str | LoadedModel,
    task: str | Task,
    device: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
) -> _Asked:
    chosen = load_task(task) if isinstance(task, str) else task
    if isinstance(model, LoadedModel):
        return _Asked(model, chosen)
    loaded = load_model(
        model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    named = {
        "model": model, "task": task, "device": device, "dtype": dtype, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    return _Asked(loaded, chosen, named if isinstance(task, str) else None)


def _folder(out: Path | str | None, asked: _Asked, settings: Settings, what: str) -> Path:
    return Path(out) if out is not None else STUDIES / study_name(asked.loaded, asked.task, settings, what)


def _run_of_study(folder: Path, loaded: LoadedModel) -> Run | None:
    """The run below `runs/` that the study (or the first of a sweep) in a folder was begun with.

    Raises:
        UserError: the study is of another model, for which no run of this one would do.
    """
    places = [folder / "study.json", *sorted(folder.glob("b*/study.json"))]
    noted = next((path for path in places if path.is_file()), None)
    if noted is None:
        return None
    meta = read_meta(noted.parent)
    check_folder(noted.parent, meta.model_copy(update=model_of(loaded)))
    wanted = meta.run_hash
    for path in sorted(RUNS.glob("*/meta.json")):
        with contextlib.suppress(UserError):
            run = Run.open(path.parent)
            if run.directory.hash == wanted:
                return run
    return None
