"""Studies in PostgreSQL, for workers on several machines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from avlprof.errors import UserError
from avlprof.tuning.storages._base import META, WORKER, StudyStorage, retry, trials_in, worker_name

HEARTBEAT, GRACE = 15, 60
"""Seconds between two signs of life of a running trial, and without one until it is given up."""

OF_SWEEP = re.compile(r"b[\d.e-]+")
"""Folders of a sweep are named after budgets alone, which other sweeps have as well."""

DRIVER = "postgresql+psycopg"


class PostgresStorage(StudyStorage):
    """A study in PostgreSQL under the name of its folder (of sweep and folder, in a sweep).

    Running trials give a sign of life every `heartbeat` seconds; whoever holds the lock retries
    those that were silent for `grace` seconds. Locks are advisory ones of the server.

    Raises:
        UserError: not a PostgreSQL URL, or no driver is installed.
    """

    def __init__(self, folder: Path, url: str, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> None:
        self.folder, self.heartbeat, self.grace = folder, heartbeat, grace
        self.url = database_url(url)
        path = folder.resolve()
        self.study_name = f"{path.parent.name}-{path.name}" if OF_SWEEP.fullmatch(path.name) else path.name
        self.address = self._without_password()

    def _without_password(self) -> str:
        url = self.url
        open_part = sqlalchemy.URL.create(
            url.drivername, url.username, None, url.host, url.port, url.database, url.query
        )
        return open_part.render_as_string()

    def secrets(self) -> dict[str, str]:
        return {"PGPASSWORD": str(self.url.password)} if self.url.password else {}

    def backend(self) -> BaseStorage:
        return self._backend

    @cached_property
    def _backend(self) -> RDBStorage:
        # two processes that make the tables of an empty database at once get into each other's way
        with self._server_lock("tables"), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return RDBStorage(
                self.url.render_as_string(hide_password=False),
                engine_kwargs={"pool_pre_ping": True},
                heartbeat_interval=self.heartbeat,
                grace_period=self.grace,
                heartbeat_stale_trial_callback=retry,
            )

    @cached_property
    def _engine(self) -> sqlalchemy.Engine:
        try:
            return sqlalchemy.create_engine(self.url, poolclass=sqlalchemy.NullPool)
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise UserError(
                f"a study in PostgreSQL needs a driver ({error}); pip install 'avlprof[postgres]'"
            ) from None

    def exists(self) -> bool:
        with self._server_lock("tables"):
            tables = sqlalchemy.inspect(self._engine).has_table("studies")
        return tables and self.study_name in optuna.get_all_study_names(self.backend())

    def missing(self) -> str:
        return f"{self.address} has no study '{self.study_name}'; begin it with 'avlprof tune'"

    def read_note(self, name: str) -> str | None:
        if not self.exists():
            return None
        number = self._backend.get_study_id_from_name(self.study_name)
        # what a study is about stands where the dashboard shows it
        if name == META:
            meta = self._backend.get_study_user_attrs(number).get(META)
            return None if meta is None else json.dumps(meta)
        note: str | None = self._backend.get_study_system_attrs(number).get(_note(name))
        return note

    def write_note(self, name: str, text: str) -> None:
        study = self.open()
        if name == META:
            study.set_user_attr(META, json.loads(text))
        else:
            self._backend.set_study_system_attr(study._study_id, _note(name), text)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return self._server_lock(f"study {self.study_name}")

    @contextlib.contextmanager
    def _server_lock(self, name: str) -> Iterator[None]:
        """Holds an advisory lock of the server, which ends with the connection."""
        digest = hashlib.sha256(f"avlprof {name}".encode()).digest()
        key = int.from_bytes(digest[:8], "big", signed=True)
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(self._engine.begin())
            except OperationalError as error:
                reason = " ".join(str(error.orig).split())
                raise UserError(
                    f"database {self.address} cannot be reached ({reason}); a password may be in the URL, in "
                    "PGPASSWORD or in ~/.pgpass"
                ) from None
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield

    @contextlib.contextmanager
    def join(self, shared: bool) -> Iterator[str]:
        yield worker_name()

    def begin(self, trial: optuna.Trial, worker: str) -> None:
        # a trial without any sign of life would never count as stale
        self._backend.record_heartbeat(trial._trial_id)
        trial.set_user_attr(WORKER, worker)

    @contextlib.contextmanager
    def alive(self, trials: Sequence[optuna.Trial]) -> Iterator[None]:
        ended = threading.Event()

        def live() -> None:
            while not ended.wait(self.heartbeat):
                for trial in trials:
                    with contextlib.suppress(Exception):  # as Optuna's own: one that fails is not the last
                        self._backend.record_heartbeat(trial._trial_id)
            self._backend.remove_session()

        thread = threading.Thread(target=live, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        running = trials_in(study, TrialState.RUNNING)
        return [trial for trial in running if WORKER not in trial.user_attrs]

    def busy(self, study: optuna.Study) -> bool:
        return bool(trials_in(study, TrialState.RUNNING))


def _note(name: str) -> str:
    return f"avlprof:{name}"


def database_url(text: str) -> sqlalchemy.URL:
    """A PostgreSQL URL with its driver.

    Raises:
        UserError: another database, or not a URL.
    """
    try:
        url = sqlalchemy.make_url(text)
    except ArgumentError:
        raise UserError("storage must be a URL like postgresql://user@host/database") from None
    kind, _, driver = url.drivername.partition("+")
    if kind not in ("postgres", "postgresql"):
        raise UserError(
            f"storage must be a PostgreSQL URL (postgresql://user@host/database), got one of {kind}; "
            "without one the journal in the study's folder serves all workers of a machine"
        )
    return url if driver else url.set(drivername=DRIVER)
