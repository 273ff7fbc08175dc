"""How many trials a second a study's storage takes, from simulated workers whose trials only sleep."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage
from sqlalchemy.exc import OperationalError

from avlprof.errors import UserError, cut
from avlprof.tuning import Settings
from avlprof.tuning.objective import Objective
from avlprof.tuning.storages._base import StudyStorage, quiet
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.storages.postgres import PostgresStorage
from avlprof.tuning.trials import run_trials
from avlprof.watch import SILENT, Watch

REPORTS = 8
"""Values that a trial reports on its way, as one of 8 samples does."""
SCALARS = 6


@dataclass(frozen=True)
class StorageCost:
    """Trials a second of `workers` at once; `share` is that over what workers who never wait would do.

    `overhead` is what a trial takes beside its sleep, in seconds, as its worker sees it; `cpu` are
    seconds of a core that it takes here, without those of a database server.
    """

    storage: str
    workers: int
    trials: int
    seconds: float
    per_second: float
    share: float
    overhead: float
    cpu: float


def run_storage_bench(
    workers: Sequence[int], url: str | None, each: int, sleep: float, watch: Watch = SILENT
) -> list[StorageCost]:
    """Time studies of simulated workers: threads of this process, each with a storage object of its own.

    Journal and PostgreSQL are as studies use them, with their locks and what they find out before
    each trial; `grpc` is Optuna's proxy before the same PostgreSQL, and beside it PostgreSQL as
    Optuna alone uses it, without these. One process has one interpreter: from some number of
    workers on it is what is measured, which the figures of the fastest storage show.

    Args:
        url: of a PostgreSQL database; None: the journal alone.
        each: trials of a worker.
        sleep: seconds of a trial.
    """
    kinds = ["journal"] if url is None else ["journal", "postgresql", "postgresql alone", "grpc alone"]
    costs = []
    for number, kind in enumerate(kinds):
        for index, count in enumerate(workers):
            watch.phase("bench storage", number * len(workers) + index, len(kinds) * len(workers))
            try:
                costs.append(_cost(kind, count, url, each, sleep))
            except (UserError, OperationalError) as error:  # of the server: too many connections, above all
                watch.say(f"{kind} with {count} workers: {cut(' '.join(str(error).split()), 300)}")
    watch.phase("bench storage", len(kinds) * len(workers), len(kinds) * len(workers))
    return costs


def _cost(kind: str, count: int, url: str | None, each: int, sleep: float) -> StorageCost:
    with tempfile.TemporaryDirectory(prefix="avlprof-storage-") as folder, quiet():
        path = Path(folder) / f"bench-{secrets.token_hex(4)}"
        path.mkdir()
        with _working(kind, path, url, count * each, sleep) as work:
            before = time.process_time()
            seconds = _timed(work, count, each)
            cpu = time.process_time() - before
    trials = count * each
    ideal = each * sleep
    return StorageCost(
        kind,
        count,
        trials,
        seconds,
        trials / seconds,
        ideal / seconds,
        (seconds - ideal) / each,
        cpu / trials,
    )


def _timed(work: Callable[[int], object], count: int, each: int) -> float:
    """Seconds in which so many threads do their work, which are all ready before the first begins."""
    ready, errors = threading.Barrier(count + 1), list[BaseException]()

    def run() -> None:
        try:
            ready.wait()
            work(each)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - began


@contextlib.contextmanager
def _working(
    kind: str, path: Path, url: str | None, trials: int, sleep: float
) -> Iterator[Callable[[int], object]]:
    """What a worker does, for so many trials of its own; the study is removed at the end."""

    def storage() -> StudyStorage:
        return FolderStorage(path) if url is None or kind == "journal" else PostgresStorage(path, url)

    begun = storage()
    begun.open()
    try:
        if "alone" not in kind:
            settings = Settings(trials=trials, refine=0, prune=False, sampler="random")
            objective = cast(Objective, _Sleeping(sleep))
            yield lambda each: run_trials(storage(), settings, objective, shared=True)
        elif kind == "grpc alone":
            with _proxied(begun.backend()) as connect:
                yield lambda each: _plain(connect(), begun.study_name, each, sleep)
        else:
            yield lambda each: _plain(storage().backend(), begun.study_name, each, sleep)
    finally:
        if kind != "journal":
            optuna.delete_study(study_name=begun.study_name, storage=begun.backend())


class _Sleeping:
    """A score that takes its time, as much of an `Objective` as `run_trials` asks for."""

    budget = None
    space = SimpleNamespace(starts=list)

    def __init__(self, sleep: float) -> None:
        self._sleep = sleep

    def suggest(self, trial: optuna.Trial) -> None:
        """The trial is asked while it is scored."""

    def score(
        self, batch: Sequence[tuple[optuna.Trial, None]], *further: object
    ) -> Iterator[tuple[optuna.Trial, float]]:
        """As that of an `Objective`."""
        for trial, _ in batch:
            yield trial, self(trial)

    def __call__(self, trial: optuna.Trial) -> float:
        for number in range(SCALARS):
            trial.suggest_float(f"x{number}", 0.0, 1.0)
        for step in range(REPORTS):
            time.sleep(self._sleep / REPORTS)
            trial.report(1.0, step)
        trial.set_user_attr("complete", True)
        return 1.0


def _plain(storage: BaseStorage, name: str, each: int, sleep: float) -> None:
    """So many trials as Optuna alone runs them."""
    sampler = optuna.samplers.RandomSampler()
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    study.optimize(_Sleeping(sleep), n_trials=each)


@contextlib.contextmanager
def _proxied(storage: BaseStorage) -> Iterator[Callable[[], Any]]:
    """Optuna's gRPC proxy before a storage, on a free port of this machine; gives what connects to it."""
    try:
        from optuna.storages import GrpcStorageProxy
        from optuna.storages._grpc.server import make_server

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = make_server(storage, "127.0.0.1", port)
    except ImportError:
        raise UserError("the gRPC proxy needs grpcio and protobuf; pip install grpcio protobuf") from None
    server.start()
    try:
        yield lambda: GrpcStorageProxy(host="127.0.0.1", port=port)
    finally:
        server.stop(grace=1).wait()
