"""Where a study lives: a folder with an Optuna journal and what the study is about."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from avlprof.errors import UserError
from avlprof.files import write_text

JOURNAL = "journal.log"
NAME = "avlprof"


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


def mend_journal(folder: Path) -> None:
    """Undo what a killed process left half done: its lock on the journal and a torn last line.

    Only for a study that no other process works on.
    """
    journal = folder / JOURNAL
    journal.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)
    if journal.exists():
        written = journal.read_bytes()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            os.truncate(journal, whole)


def open_study(folder: Path, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    """The Optuna study of a folder, made when it is not there yet; lower values are better."""
    with quiet():
        return optuna.create_study(
            study_name=NAME,
            storage=_storage(folder),
            pruner=pruner or optuna.pruners.NopPruner(),
            direction="minimize",
            load_if_exists=True,
        )


def read_study(folder: Path) -> optuna.Study:
    """The Optuna study of a folder, to look at; nothing is written.

    Raises:
        UserError: no trial was begun yet.
    """
    with quiet(), contextlib.suppress(KeyError):
        if (folder / JOURNAL).exists():
            return optuna.load_study(
                study_name=NAME, storage=_storage(folder), pruner=optuna.pruners.NopPruner()
            )
    raise UserError(f"study {folder} has no trial yet; run the same 'avlprof tune' again")


def give_up_running(study: optuna.Study) -> list[FrozenTrial]:
    """Mark the trials that a killed process left running as failed; returns them.

    Only for a study that no other process works on.
    """
    left: list[FrozenTrial] = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in left:
        study.tell(trial.number, state=TrialState.FAIL)
    return left


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


def _storage(folder: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
