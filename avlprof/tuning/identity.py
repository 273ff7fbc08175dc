"""What makes a study this one and no other."""

from __future__ import annotations

from avlprof.analysis import Profile
from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.tuning.prepared import answer_limit
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.storage import StudyMeta, sample_hash


def model_of(loaded: LoadedModel) -> dict[str, str]:
    """What tells one model from another, as fields of `StudyMeta`."""
    return {"model": loaded.source, "model_hash": loaded.revision or ""}


def study_meta(
    loaded: LoadedModel, task: Task, profile: Profile, settings: Settings, space: Space
) -> StudyMeta:
    """What a study searches for."""
    samples = task.samples(settings.split, settings.samples)
    return StudyMeta(
        **model_of(loaded),
        task=task.name,
        split=settings.split,
        samples=len(samples),
        sample_hash=sample_hash(samples),
        max_new_tokens=answer_limit(task, settings),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        budget=settings.budget,
        read_budget=settings.read_budget,
        objective=settings.objective,
        sampler=settings.sampler,
        seed=settings.seed,
        run_hash=profile.meta.run_hash,
        space=space.described(),
    )
