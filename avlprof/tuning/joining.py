"""A further worker of a study that was begun elsewhere, in its folder or its database."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import optuna

from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore
from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.tuning.candidate import Budget
from avlprof.tuning.evidence import read_evidence
from avlprof.tuning.generated import Generated
from avlprof.tuning.objective import Objective, Scores
from avlprof.tuning.places import Place
from avlprof.tuning.prepared import Progress, forced_answers
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.storage import StudyMeta, claim_study, place_meta, sample_hash
from avlprof.tuning.trials import asked_of, run_trials
from avlprof.tuning.warm import noted_starts
from avlprof.tuning.workers import watch_parent


def join(loaded: LoadedModel, task: Task, place: Place, *, progress: Progress | None = None) -> optuna.Study:
    """Work on a study until its trials are done; what is searched follows from the study itself.

    Args:
        loaded: the study's model; the same checkpoint and precision.
        task: the study's task; the same samples.

    Raises:
        UserError: the study is not begun, or is one of another model or task.
    """
    meta, trials, prune = place_meta(place), *asked_of(place)
    samples = task.samples(meta.split, meta.samples)
    claim_study(place, _asked(meta, loaded, task, sample_hash(samples)))
    evidence = read_evidence(place)
    tell = progress or (lambda phase, done, total: None)
    space = _space(meta)
    forced = forced_answers(loaded, samples, meta.max_new_tokens, meta.objective, space.scorers, progress)
    steps = max(round(forced.answer_tokens), 1)
    budget = Budget(meta.budget, meta.read_budget, tuple(forced.shapes), steps)
    space = space.within(budget, evidence.layers).supported(evidence)
    space = replace(space, warm=noted_starts(place.folder, ()))
    scores: Scores = forced
    if meta.objective == "accuracy":
        lengths = {name: shape.total for name, shape in zip(forced.samples, forced.shapes, strict=True)}
        store = AnswerStore(place.folder / "answers")
        scores = Generated(loaded, task, samples, meta.max_new_tokens, lengths, store)
    settings = Settings(
        budget=meta.budget,
        read_budget=meta.read_budget,
        trials=trials,
        refine=0,
        samples=meta.samples,
        seed=meta.seed,
        prune=prune,
        objective=meta.objective,
        sampler=meta.sampler,
        split=meta.split,
        max_new_tokens=meta.max_new_tokens,
    )
    return run_trials(
        place.folder,
        settings,
        space,
        Objective(scores, evidence, budget, space, meta.objective),
        progress=lambda d, t: tell("trials", d, t),
        place=place,
        shared=True,
        watch=watch_parent(),
    )


def _asked(meta: StudyMeta, loaded: LoadedModel, task: Task, asked: str) -> StudyMeta:
    """The study as this worker would search it."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    if loaded.source != meta.model and not loaded.revision:
        raise UserError(f"{loaded.source} cannot be told to be {meta.model}, which the study is of")
    return meta.model_copy(
        update={
            "model_hash": loaded.revision or "",
            "task": task.name,
            "sample_hash": asked,
            "dtype": dtype,
        }
    )


def _space(meta: StudyMeta) -> Space:
    """The space that `Space.described` told of."""
    usual = Space()
    values: dict[str, Any] = {
        name: held[0] if isinstance(getattr(usual, name), str) else held for name, held in meta.space.items()
    }
    known = {field.name for field in fields(Space)}
    return Space(**{name: value for name, value in values.items() if name in known})
