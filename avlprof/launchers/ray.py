"""Workers as actors of a Ray cluster that runs already (https://docs.ray.io)."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avlprof.errors import UserError
from avlprof.launchers._base import Job, Launcher, Started, run_python

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Ray(Launcher):
    """An actor each, spread over the nodes of a cluster; a node that is lost takes its actors with it.

    Attributes:
        address: of the cluster (`host:6379`); `auto` is what `RAY_ADDRESS` says or the one that runs
            here, `local` a new one of this machine.
        num_cpus: cores of an actor.
        num_gpus: GPUs of an actor, which may be a part of one; below 0 it is 1 where the cluster has any.
    """

    address: str = "auto"
    num_cpus: float = 1.0
    num_gpus: float = -1.0

    @contextlib.contextmanager
    def session(self, scratch: Path) -> Iterator[Callable[[Job], Started]]:
        try:
            import ray
        except ImportError:
            raise UserError("launcher 'ray' needs Ray; pip install 'avlprof[ray]'") from None
        ours = not ray.is_initialized()
        if ours:
            try:
                _answers(self.address)
                with _own_handler():
                    ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"no Ray cluster answers at '{self.address}' ({reason[:200]}); begin one with "
                    "'ray start --head', or give --launcher-args address=local"
                ) from None
        gpus = self.num_gpus if self.num_gpus >= 0 else float(ray.cluster_resources().get("GPU", 0) > 0)
        actors = ray.remote(
            num_cpus=self.num_cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )(Runner)
        try:
            yield lambda job: Actor(ray, actors.remote(), job)
        finally:
            if ours:
                ray.shutdown()


def _answers(address: str) -> None:
    """`OSError` where nobody listens at a `host:port`: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


@contextlib.contextmanager
def _own_handler() -> Iterator[None]:
    """Puts back what this process does on TERM, for which Ray sets a handler of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class Runner:
    """The actor: one process, one job."""

    def run(self, job: Job) -> tuple[int, str]:
        """Exit code and last line of a job."""
        return run_python(job)


class Actor(Started):
    """An actor at work, or waiting for the resources that it asks for."""

    def __init__(self, ray: Any, actor: Any, job: Job) -> None:
        self._ray, self._actor = ray, actor
        self._outcome: tuple[int, str] | None = None
        self._running = actor.run.remote(job)

    def code(self) -> int | None:
        if self._outcome is None and self._ray.wait([self._running], timeout=0)[0]:
            try:
                self._outcome = self._ray.get(self._running)
            except self._ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())
                self._outcome = (1, f"{type(error).__name__}: {reason[:300]}")
        return None if self._outcome is None else self._outcome[0]

    def last_words(self) -> str:
        return "" if self._outcome is None else self._outcome[1]

    def stop(self) -> None:
        self._ray.kill(self._actor)

    def end(self, seconds: float) -> None:
        self._ray.kill(self._actor)  # at once, and again is harmless
