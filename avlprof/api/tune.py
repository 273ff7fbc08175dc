"""`avlprof.tune` and its kin: the search with everything it needs found or made."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avlprof.analysis import Profile
from avlprof.api.trace import trace
from avlprof.errors import UserError
from avlprof.evaluation.certificate import Claim
from avlprof.files import check_output
from avlprof.locks import check_free
from avlprof.models import LoadedModel, ModelSpec, load_model
from avlprof.models.smaller import check_kind
from avlprof.run import RUNS, Run, latest_run
from avlprof.tasks import Task
from avlprof.tasks.spec import TaskSpec
from avlprof.tracing.options import RecordOptions, TraceSettings
from avlprof.tuning import Certified, Settings, Smallest, Sweep, Tuned, Workers, read_meta
from avlprof.tuning.certify import certified as run_certified
from avlprof.tuning.settings import BUDGET, check_budget
from avlprof.tuning.smallest import check_wanted
from avlprof.tuning.smallest import smallest as run_smallest
from avlprof.tuning.study import check_folder, model_of
from avlprof.tuning.sweep import sweep as run_sweep
from avlprof.tuning.tune import tune as run_study
from avlprof.watch import SILENT, Watch

STUDIES = Path("studies")
TRACED_SAMPLES = 32


def tune(
    model: str | ModelSpec | LoadedModel = "tiny",
    task: str | TaskSpec | Task = "shapes",
    budget: float = BUDGET,
    settings: Settings | None = None,
    *,
    run: Run | Path | str | None = None,
    out: Path | str | None = None,
    workers: int | Workers = 1,
    watch: Watch = SILENT,
) -> Tuned:
    """Find the best policy at a budget of prompt KV and prove it; the same call resumes.

    Args:
        model: alias, hub id or local folder, a spec that says how to load it, or a loaded model.
        task: what `avlprof.load_task` takes, a `TaskSpec` that says how to read it, or a task.
        budget: prompt KV live after prefill over dense, in [0, 1].
        settings: everything else about the search: trials, samples, objective, space, ...
        run: the traced run whose profile shapes the policies; by default that of the study in
            `out`, else the newest below `runs/` of this model and task, or one is made.
        out: folder of the study; by default one below `studies/` named after what it searches.
        workers: processes on this machine that run trials, this one included; with more than one
            model and task are given by name. `avlprof.tuning.Workers` says where trials are kept
            as well.
        watch: who watches: progress, trials and sentences.

    Raises:
        UserError: an infeasible budget, a run of another model, or a folder of another study.
    """
    settings = settings or Settings()
    check_budget("budget", budget)
    plan = _plan(model, task, settings, f"b{budget:g}", run, out, workers, watch)
    return run_study(
        plan.loaded, plan.task, plan.profile, plan.folder, budget, settings,
        workers=plan.workers, watch=watch,
    )  # fmt: skip


def sweep(
    model: str | ModelSpec | LoadedModel = "tiny",
    task: str | TaskSpec | Task = "shapes",
    budgets: Sequence[float] = (0.1, 0.2, 0.4),
    settings: Settings | None = None,
    *,
    run: Run | Path | str | None = None,
    out: Path | str | None = None,
    workers: int | Workers = 1,
    watch: Watch = SILENT,
) -> Sweep:
    """Tune and prove at several budgets, each started from its neighbour's best; resumes.

    Args:
        budgets: shares of the dense prompt KV in memory after prefill.

    The other arguments are those of `tune`.

    Raises:
        UserError: as `tune`.
    """
    settings = settings or Settings()
    plan = _plan(model, task, settings, "sweep", run, out, workers, watch)
    return run_sweep(
        plan.loaded, plan.task, plan.profile, plan.folder, budgets, settings,
        workers=plan.workers, watch=watch,
    )  # fmt: skip


def smallest(
    model: str | ModelSpec | LoadedModel = "tiny",
    task: str | TaskSpec | Task = "shapes",
    drop: float = 0.01,
    settings: Settings | None = None,
    *,
    run: Run | Path | str | None = None,
    out: Path | str | None = None,
    workers: int | Workers = 1,
    watch: Watch = SILENT,
) -> Smallest:
    """Find the smallest budget whose tuned policy loses at most `drop` of the metric; resumes.

    Budgets are judged on the search split, and the smallest that holds is tested on held-out
    samples, once. The other arguments are those of `tune`.

    Raises:
        UserError: as `tune`, or no budget holds the drop.
    """
    settings = settings or Settings()
    check_wanted(drop, settings)
    plan = _plan(model, task, settings, f"drop{drop:g}", run, out, workers, watch)
    return run_smallest(
        plan.loaded, plan.task, plan.profile, plan.folder, drop, settings,
        workers=plan.workers, watch=watch,
    )  # fmt: skip


def certified(
    model: str | ModelSpec | LoadedModel = "tiny",
    task: str | TaskSpec | Task = "shapes",
    claim: Claim | None = None,
    settings: Settings | None = None,
    *,
    run: Run | Path | str | None = None,
    out: Path | str | None = None,
    workers: int | Workers = 1,
    watch: Watch = SILENT,
) -> Certified:
    """Tune at several budgets, and certify the smallest whose mean drop is at most what is allowed.

    Args:
        claim: the budgets, the drop of the metric that is allowed, the confidence, and how many samples
            that neither search nor proof sees.

    The other arguments are those of `sweep`.

    Raises:
        UserError: as `sweep`, or the task has no samples left for the tests.
    """
    settings, claim = settings or Settings(), claim or Claim()
    plan = _plan(model, task, settings, f"certified{claim.drop:g}", run, out, workers, watch)
    return run_certified(
        plan.loaded, plan.task, plan.profile, plan.folder, claim, settings,
        workers=plan.workers, watch=watch,
    )  # fmt: skip


def study_name(loaded: LoadedModel, task: Task, settings: Settings, goal: str) -> str:
    """`<model>-<task>-<goal>`, with the read budget, objective, sampler and seed that are not default."""
    parts = [Path(loaded.name).name, task.name, goal]
    if settings.read_budget is not None:
        parts.append(f"r{settings.read_budget:g}")
    parts += [
        value
        for value, default in (
            (settings.objective, Settings.objective),
            (settings.sampler, Settings.sampler),
        )
        if value != default
    ]
    if settings.seed:
        parts.append(f"s{settings.seed}")
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


@dataclass(frozen=True)
class _Plan:
    """What a study, or several of a model and task, run on."""

    loaded: LoadedModel
    task: Task
    profile: Profile
    folder: Path
    workers: Workers


def _plan(
    model: str | ModelSpec | LoadedModel,
    task: str | TaskSpec | Task,
    settings: Settings,
    goal: str,
    run: Run | Path | str | None,
    out: Path | str | None,
    workers: int | Workers,
    watch: Watch,
) -> _Plan:
    """Load model and task, name the folder, and find the traced run or make one."""
    source = TaskSpec(task) if isinstance(task, str) else task
    read = source.load() if isinstance(source, TaskSpec) else source
    for split, count in ((settings.split, settings.samples), (settings.proof_split, settings.proof_samples)):
        read.samples(split, count)
    spec = ModelSpec(model) if isinstance(model, str) else model
    if isinstance(workers, int):
        workers = Workers(workers)
    workers = workers.named(
        spec if isinstance(spec, ModelSpec) else None, source if isinstance(source, TaskSpec) else None
    )
    if out is not None:
        check_output(out, folder=True)
        check_free(Path(out))
    loaded = load_model(spec) if isinstance(spec, ModelSpec) else spec
    for way in settings.space.picture_kinds:
        check_kind(loaded.adapter, way)
    if note := loaded.adapter.partly_governed:
        watch.say(note)
    folder = Path(out) if out is not None else STUDIES / study_name(loaded, read, settings, goal)
    check_free(folder)
    profile = _run(run, folder, loaded, read, settings, watch).profile()
    return _Plan(loaded, read, profile, folder, workers)


def _run(
    run: Run | Path | str | None,
    folder: Path,
    loaded: LoadedModel,
    task: Task,
    settings: Settings,
    watch: Watch,
) -> Run:
    """The run to take the profile from, of this model; traced here when there is none.

    It keeps heads apart where a search moves them.
    """
    if run is not None:
        traced: Run | None = run if isinstance(run, Run) else Run.open(run)
    else:
        traced = _run_of_study(folder, loaded) or latest_run(loaded=loaded, task=task.name)
    if traced is None:
        few = len(task.samples("search", TRACED_SAMPLES))
        record = RecordOptions(per_head=settings.refine_heads > 0)
        wanted = TraceSettings(max_new_tokens=settings.max_new_tokens, record=record)
        traced = trace(loaded, task, few, wanted, watch=watch)
    traced.check_model(loaded)
    return traced


def _run_of_study(folder: Path, loaded: LoadedModel) -> Run | None:
    """The run below `runs/` that the study (or the first of a sweep) in a folder was begun with.

    Raises:
        UserError: the study is of another model, for which no run of this one would do.
    """
    notes = [folder / "study.json", *sorted(folder.glob("b*/study.json"))]
    noted = next((path for path in notes if path.is_file()), None)
    if noted is None:
        return None
    meta = read_meta(noted.parent)
    check_folder(noted.parent, meta.model_copy(update=model_of(loaded)))
    for path in sorted(RUNS.glob("*/meta.json")):
        with contextlib.suppress(UserError):
            run = Run.open(path.parent)
            if run.directory.hash == meta.run_hash:
                return run
    return None
