"""Where a study lives: a folder with an Optuna journal and what the study is about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from avlprof.errors import UserError
from avlprof.files import write_text

JOURNAL = "journal.log"


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
    budget: float
    read_budget: float | None
    seed: int
    run_hash: str

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


def claim_folder(folder: Path, meta: StudyMeta) -> None:
    """Make the folder of a study, or check that the one there is the same study."""
    if (folder / "study.json").exists():
        different = read_meta(folder).differences(meta)
        if different:
            raise UserError(f"{folder} holds another study ({'; '.join(different)}); choose another --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a study; choose another --out")
    write_text(folder / "study.json", meta.model_dump_json(indent=2) + "\n")


def open_study(
    folder: Path,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
) -> optuna.Study:
    """The Optuna study of a folder, made when it is not there yet; lower values are better."""
    with quiet():
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        return optuna.create_study(
            study_name="avlprof",
            storage=storage,
            sampler=sampler,
            pruner=pruner or optuna.pruners.NopPruner(),
            direction="minimize",
            load_if_exists=True,
        )


def give_up_running(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Mark trials that a killed process left running as failed and queue their parameters again.

    Only for a study that no other process works on.
    """
    left: list[optuna.trial.FrozenTrial] = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in left:
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}))
    return left


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own log lines are shown from warnings on, inside the context."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
