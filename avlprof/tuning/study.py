"""What makes a study this one and no other; opening it, and its best trials."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.tuning.storages._base import Place
from avlprof.tuning.storages.journal import FolderPlace
from avlprof.tuning.storages.postgres import DatabasePlace

if TYPE_CHECKING:
    from avlprof.analysis import Profile
    from avlprof.models import LoadedModel
    from avlprof.tasks import Sample, Task
    from avlprof.tuning.settings import Settings
    from avlprof.tuning.space import Space


META = "study"
NOTE = "storage.txt"


class StudyMeta(BaseModel):
    """What a study searches for; a study is resumed only if this is the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: str = "avlprof.study/1"
    model: str
    model_hash: str
    task: str
    split: str
    samples: int
    sample_hash: str
    max_new_tokens: int
    dtype: str
    budget: float
    read_budget: float | None
    objective: str = "fidelity"
    sampler: str = "tpe"
    seed: int
    run_hash: str
    space: dict[str, tuple[int | str, ...]]

    def differences(self, asked: StudyMeta) -> list[str]:
        """Fields in which another study differs, in words."""
        return [
            f"{name}: {getattr(self, name)!r} here, {getattr(asked, name)!r} asked"
            for name in type(self).model_fields
            if getattr(self, name) != getattr(asked, name)
        ]


def read_meta(folder: Path) -> StudyMeta:
    """The study of a folder; `UserError` when there is none."""
    try:
        return StudyMeta.model_validate_json((folder / "study.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a study (no study.json); make one with 'avlprof tune'") from None
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / 'study.json'} cannot be read: {' '.join(str(error).split())}") from None


def check_folder(folder: Path, meta: StudyMeta) -> None:
    """`UserError` unless the folder holds this study, or is new or empty."""
    if (folder / "study.json").exists():
        different = read_meta(folder).differences(meta)
        if different:
            raise UserError(f"{folder} holds another study ({'; '.join(different)}); choose another --out")
    elif folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise UserError(f"{folder} is not empty and not a study; choose another --out")


def claim_folder(folder: Path, meta: StudyMeta) -> None:
    """Make the folder of a study, or check that the one there is the same study."""
    check_folder(folder, meta)
    if not (folder / "study.json").exists():
        write_text(folder / "study.json", meta.model_dump_json(indent=2) + "\n")


def find_place(folder: Path, storage: str | None = None) -> Place:
    """Where the trials of a folder's study are: in the database asked for or noted, else its journal.

    Raises:
        UserError: the folder's trials are elsewhere than asked for, or the URL is not PostgreSQL's.
    """
    note = folder / NOTE
    noted = note.read_text(encoding="utf-8").strip() if note.exists() else None
    if storage is None:
        return FolderPlace(folder) if noted is None else DatabasePlace(folder, noted)
    place = DatabasePlace(folder, storage)
    if noted is not None and noted != place.address:
        raise UserError(
            f"the trials of {folder} are in {noted}, not in {place.address}; choose another --out"
        )
    if noted is None and FolderPlace(folder).exists():
        raise UserError(
            f"the trials of {folder} are in its journal; leave --storage out, or choose another --out"
        )
    return place


def claim_study(place: Place, meta: StudyMeta) -> None:
    """Make the study of a place, or check that the one there is the same study.

    A database is shared by all who know its address, so the study says there as well what it is
    about, and the folder notes the address, without its password.

    Raises:
        UserError: the place holds another study, or one that avlprof did not make.
    """
    check_folder(place.folder, meta)
    if not isinstance(place, DatabasePlace):
        claim_folder(place.folder, meta)
        return
    study = open_study(place)
    with place.turn():
        held = study.user_attrs.get(META)
        if held is None:
            if study.get_trials(deepcopy=False):
                raise UserError(
                    f"'{place.study_name}' is a study that avlprof did not make; choose another --out"
                )
            study.set_user_attr(META, meta.model_dump(mode="json"))
        else:
            different = StudyMeta.model_validate(held).differences(meta)
            if different:
                raise UserError(
                    f"'{place.study_name}' is another study ({'; '.join(different)}); choose another --out"
                )
    claim_folder(place.folder, meta)
    write_text(place.folder / NOTE, place.address + "\n")


def place_meta(place: Place) -> StudyMeta:
    """What the study of a place is about: as the database says, or the folder.

    Raises:
        UserError: no study was begun there.
    """
    if isinstance(place, DatabasePlace):
        held = open_study(place).user_attrs.get(META) if place.exists() else None
        if held is None:
            raise UserError(
                f"{place.address} has no study '{place.study_name}'; begin it with 'avlprof tune'"
            )
        return StudyMeta.model_validate(held)
    return read_meta(place.folder)


def sample_hash(samples: Sequence[Sample]) -> str:
    """A fingerprint of which samples are searched on, and what they ask."""
    asked = json.dumps([[sample.id, sample.asked] for sample in samples])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def open_study(place: Place, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    """The Optuna study of a place, made when it is not there yet; lower values are better."""
    with quiet():
        return optuna.create_study(
            study_name=place.study_name,
            storage=place.storage(),
            pruner=pruner or optuna.pruners.NopPruner(),
            direction="minimize",
            load_if_exists=True,
        )


def read_study(folder: Path) -> optuna.Study:
    """The Optuna study of a folder, to look at; nothing is written.

    Raises:
        UserError: no trial was begun yet.
    """
    place = find_place(folder)
    with quiet(), contextlib.suppress(KeyError):
        if place.exists():
            return optuna.load_study(
                study_name=place.study_name, storage=place.storage(), pruner=optuna.pruners.NopPruner()
            )
    raise UserError(f"study {folder} has no trial yet; run the same 'avlprof tune' again")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own log lines are shown from errors on, inside the context.

    Its warnings would print the traceback of a trial that stopped; the exception itself goes on.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


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
        max_new_tokens=settings.answer_limit(task),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        budget=settings.budget,
        read_budget=settings.read_budget,
        objective=settings.objective,
        sampler=settings.sampler,
        seed=settings.seed,
        run_hash=profile.meta.run_hash,
        space=space.described(),
    )


def finalists(study: optuna.Study, count: int, *more: optuna.Study) -> list[FrozenTrial]:
    """The best `count` fully scored trials of one study or several with different policies, best first."""
    trials = [
        trial
        for each in (study, *more)
        for trial in each.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get("complete") and trial.value is not None
    ]
    if not trials:
        raise UserError("the study has no finished trial; run 'avlprof tune' again with more --trials")
    best: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda t: (t.value, t.number)):
        best.setdefault(trial.user_attrs["policy"], trial)
    return list(best.values())[:count]
