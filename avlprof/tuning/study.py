"""What makes a study this one and no other; where its trials are, and the best of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.models.identity import listed, noted_differences
from avlprof.policy import FULL
from avlprof.runs.meta import NOTED
from avlprof.tuning.space import Space
from avlprof.tuning.storages._base import META, StudyStorage, quiet, trials_in
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.storages.postgres import PostgresStorage

if TYPE_CHECKING:
    from avlprof.models import LoadedModel
    from avlprof.tasks import Sample, Task
    from avlprof.tuning.settings import Settings


ADDRESS = "storage.txt"


class StudyMeta(BaseModel):
    """What a study searches for; a study is resumed only if this is the same.

    `checkpoint` and `dataset` are as in `avlprof.runs.RunMeta`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: str = "avlprof.study/1"
    model: str
    model_hash: str
    checkpoint: dict[str, str] = {}
    task: str
    dataset: dict[str, str] = {}
    split: str
    samples: int
    sample_hash: str
    max_new_tokens: int
    dtype: str
    budget: float
    read_budget: float | None
    objective: str = "fidelity"
    sampler: str = "tpe"
    halving: int = 1
    seed: int
    run_hash: str
    space: dict[str, tuple[int | float | str, ...]]

    def differences(self, other: StudyMeta) -> list[str]:
        """Fields in which another study differs, which is asked for, in words."""
        pairs = {
            name: (getattr(self, name), getattr(other, name))
            for name in type(self).model_fields
            if name not in (*NOTED, "space")
        }
        parts = dict.fromkeys([*self.space, *other.space])  # of a space the parts that differ, not the whole
        pairs |= {f"space.{part}": (self.space.get(part), other.space.get(part)) for part in parts}
        different = [f"{name}: {a!r} here, {b!r} asked" for name, (a, b) in pairs.items() if a != b]
        for name, what in NOTED.items():
            different += noted_differences(what, getattr(self, name), getattr(other, name))
        return different


def read_meta(folder: Path) -> StudyMeta:
    """The study of a folder; `UserError` when there is none."""
    return stored_meta(FolderStorage(folder))


def stored_meta(storage: StudyStorage) -> StudyMeta:
    """What the study of a storage is about, as the storage notes it.

    Raises:
        UserError: no study was begun there, or the note is something else.
    """
    text = storage.read_note(META)
    if text is None:
        raise UserError(storage.missing())
    try:
        return StudyMeta.model_validate_json(text)
    except ValidationError as error:
        source = storage.address or storage.folder / "study.json"
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{source} is not the note of a study ({where or 'JSON'}: {first['msg']}); put a copy of it "
            "back, or begin anew in another folder"
        ) from None


def check_folder(folder: Path, meta: StudyMeta) -> None:
    """`UserError` unless the folder holds this study, or is new or empty."""
    if (folder / "study.json").exists():
        different = read_meta(folder).differences(meta)
        if different:
            raise UserError(f"{folder} holds another study ({listed(different)}); choose another folder")
    elif folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise UserError(f"{folder} is not empty and not a study; choose another folder")


def claim_folder(folder: Path, meta: StudyMeta) -> None:
    """Make the folder of a study, or check that the one there is the same study."""
    check_folder(folder, meta)
    if not (folder / "study.json").exists():
        FolderStorage(folder).write_note(META, meta.model_dump_json(indent=2))


def find_storage(folder: Path, url: str | None = None) -> StudyStorage:
    """Where the trials of a folder's study are: in the database of a URL, or as noted, else its journal.

    Raises:
        UserError: the folder's trials are elsewhere than the URL says, or it is not PostgreSQL's.
    """
    note = folder / ADDRESS
    try:
        noted = note.read_text(encoding="utf-8").strip() if note.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{note} cannot be read: {error}") from None
    if url is None:
        return FolderStorage(folder) if noted is None else PostgresStorage(folder, noted)
    storage = PostgresStorage(folder, url)
    if noted is not None and noted != storage.address:
        raise UserError(
            f"the trials of {folder} are in {noted}, not in {storage.address}; choose another folder"
        )
    if noted is None and FolderStorage(folder).exists():
        raise UserError(
            f"the trials of {folder} are in its journal; leave the storage out, or choose another folder"
        )
    return storage


def claim_study(storage: StudyStorage, meta: StudyMeta) -> None:
    """Make the study of a storage, or check that the one there is the same study.

    A database is shared by all who know its address, so the study says there as well what it is
    about, and the folder notes the address, without its password.

    Raises:
        UserError: the storage holds another study, or one that avlprof did not make.
    """
    check_folder(storage.folder, meta)
    with storage.locked():
        name = storage.study_name
        if storage.read_note(META) is None:
            if storage.exists() and storage.open().get_trials(deepcopy=False):
                raise UserError(f"'{name}' is a study that avlprof did not make; choose another folder")
            storage.write_note(META, meta.model_dump_json(indent=2))
        elif different := stored_meta(storage).differences(meta):
            raise UserError(f"'{name}' is another study ({listed(different)}); choose another folder")
    claim_folder(storage.folder, meta)
    if storage.address is not None:
        write_text(storage.folder / ADDRESS, storage.address + "\n")


def sample_hash(samples: Sequence[Sample]) -> str:
    """A fingerprint of which samples are searched on, and what they ask."""
    questions = json.dumps([[sample.id, sample.asked] for sample in samples])
    return hashlib.sha256(questions.encode()).hexdigest()[:16]


def read_study(folder: Path) -> optuna.Study:
    """The Optuna study of a folder, to look at; nothing is written.

    Raises:
        UserError: no trial was begun yet.
    """
    study = begun_study(folder)
    if study is None:
        raise UserError(f"study {folder} has no trial yet; run the same 'avlprof tune' again")
    return study


def begun_study(folder: Path) -> optuna.Study | None:
    """As `read_study`, but None where no trial was begun yet."""
    storage = find_storage(folder)
    with quiet(), contextlib.suppress(KeyError):
        if storage.exists():
            return optuna.load_study(
                study_name=storage.study_name,
                storage=storage.backend(),
                pruner=optuna.pruners.NopPruner(),
            )
    return None


def model_of(loaded: LoadedModel) -> dict[str, Any]:
    """What tells one model from another, as fields of `StudyMeta`."""
    return {"model": loaded.source, "model_hash": loaded.revision or "", "checkpoint": loaded.settings}


def as_begun(folder: Path, settings: Settings) -> Settings:
    """The settings as a study has them that was begun before all was searched that is now.

    It goes on without bits, what a refresh ranks by, or layers that lead at refreshes, unless these are
    asked for by choice.
    """
    if not (folder / "study.json").exists():
        return settings
    known, space, usual = read_meta(folder).space, settings.space, Space()
    if "bits" not in known and space.bits == usual.bits:
        space = replace(space, bits=(FULL,))
    if "text_bits" not in known and space.text_bits == usual.text_bits:
        space = replace(space, text_bits=(FULL,))
    scored = space.core_prompts, space.core_memories
    if "core_prompts" not in known and scored == (usual.core_prompts, usual.core_memories):
        space = replace(space, core_prompts=(0.0,), core_memories=(0.0,))
    if "leaders" not in known and space.leaders == usual.leaders:
        space = replace(space, leaders=(0,))
    return replace(settings, space=space)


def study_meta(
    loaded: LoadedModel, task: Task, run_hash: str, budget: float, settings: Settings
) -> StudyMeta:
    """What a study at a memory budget searches for, with the evidence of a traced run."""
    samples = task.samples(settings.split, settings.samples)
    return StudyMeta(
        **model_of(loaded),
        task=task.name,
        dataset=dict(task.provenance),
        split=settings.split,
        samples=len(samples),
        sample_hash=sample_hash(samples),
        max_new_tokens=settings.answer_limit(task),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        budget=budget,
        read_budget=settings.read_budget,
        objective=settings.objective,
        sampler=settings.sampler,
        halving=settings.halving,
        seed=settings.seed,
        run_hash=run_hash,
        space=settings.space.described(),
    )


def finalists(study: optuna.Study, count: int, *more: optuna.Study) -> list[FrozenTrial]:
    """The best `count` fully scored trials of one study or several with different policies, best first.

    Of equal ones the first is better: the policy that a later study begins with counts as what it was before.
    """
    trials = [
        trial
        for each in (study, *more)
        for trial in trials_in(each, TrialState.COMPLETE)
        if trial.user_attrs.get("complete") and trial.value is not None
    ]
    if not trials:
        raise UserError("the study has no finished trial; tune again with more trials")
    best: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda t: t.value or 0.0):
        best.setdefault(trial.user_attrs["policy"], trial)
    return list(best.values())[:count]
