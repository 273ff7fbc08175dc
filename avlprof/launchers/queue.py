"""Work for whoever is free: tasks as files in a folder that all machines see.

Who renames a task has taken it, which a shared file system lets one process alone do; no locks are
needed. A task is removed when what it asks for is on disk. So a worker that is lost loses only what
it had in hand, and others get its tasks.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from avlprof.files import write_text
from avlprof.launchers._base import orphaned
from avlprof.launchers.crew import Crew, Launch
from avlprof.locks import FolderLock
from avlprof.watch import Watch

SIGN_SECONDS: Final = 10.0
"""Between two signs of life of who leads."""
SILENT_SECONDS: Final = 120.0
"""Without one until workers leave."""
POLL_SECONDS: Final = 0.2
LEADER: Final = "leader"


@dataclass(frozen=True)
class Taken:
    """A task in somebody's hand."""

    path: Path

    @property
    def name(self) -> str:
        """Of the task."""
        return self.path.name.partition(".")[0]

    def read(self) -> Any:
        """What is to be done; None where it was taken away meanwhile."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def done(self) -> None:
        """What it asks for is on disk."""
        self.path.unlink(missing_ok=True)


class Queue:
    """The tasks of a folder: one process leads and puts them in, any number takes them.

    Attributes:
        path: the folder; there while somebody leads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._todo, self._taken, self._sign = path / "todo", path / "taken", path / "sign"

    @contextlib.contextmanager
    def led(self) -> Iterator[None]:
        """Makes the folder, and gives signs of life inside the context; then the folder is gone."""
        for folder in (self._todo, self._taken):
            folder.mkdir(parents=True)
        over = threading.Event()

        def sign() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    self._sign.touch()
                over.wait(SIGN_SECONDS)

        thread = threading.Thread(target=sign, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            shutil.rmtree(self.path, ignore_errors=True)

    def put(self, name: str, task: Mapping[str, Any]) -> None:
        """Put a task in; names order them."""
        write_text(self._todo / f"{name}.json", json.dumps(task))

    def take(self, worker: str) -> Taken | None:
        """The first task that nobody has taken, or None."""
        for path in sorted(self._todo.glob("*.json")):
            taken = self._taken / f"{path.stem}.{worker}.json"
            with contextlib.suppress(FileNotFoundError):
                path.rename(taken)
            # asked of the disk: a network file system may say that a rename failed which did not
            if taken.exists():
                return Taken(taken)
        return None

    def left(self) -> set[str]:
        """Names of the tasks that are not done."""
        # taken ones last: a task that is taken between the two looks is seen twice, and never missed
        folders = (self._todo, self._taken)
        return {Taken(path).name for folder in folders for path in folder.glob("[!.]*.json")}

    def give_back(self, worker: str) -> None:
        """Let others take what a worker had in hand."""
        for path in self._taken.glob(f"*.{worker}.json"):
            with contextlib.suppress(FileNotFoundError):
                path.rename(self._todo / f"{Taken(path).name}.json")

    def served(self, worker: str) -> bool:
        """Whether a worker has finished a task."""
        return (self.path / f"served-{worker}").exists()

    def tasks(self, worker: str) -> Iterator[Taken]:
        """Tasks for a worker until who leads is gone; it calls `done` of each before it asks for the next."""
        signed, heard = self._signed(), time.monotonic()
        while signed >= 0 and time.monotonic() - heard < SILENT_SECONDS and not orphaned():
            taken = self.take(worker)
            if taken is None:
                time.sleep(POLL_SECONDS)
            else:
                yield taken
                heard = time.monotonic()
                with contextlib.suppress(FileNotFoundError):
                    (self.path / f"served-{worker}").touch()
            last, signed = signed, self._signed()
            heard = heard if signed == last else time.monotonic()

    def _signed(self) -> float:
        """Time of the last sign of life by the clock of the file system; below 0 once all is over."""
        try:
            return self._sign.stat().st_mtime
        except FileNotFoundError:
            return 0.0 if self._todo.exists() else -1.0


class Team:
    """A queue, and those who serve it beside this process; as a context it starts and stops them.

    Args:
        launch: how many work, this process included, and what starts the others.
        folder: where the queue is, in a hidden folder, which one team has at a time.
        words: of a worker behind `python`, for the folder of its queue.
        variables: of its environment, for the folder of its queue and its number from 1 on.
    """

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        words: Callable[[Path], Sequence[str]],
        variables: Callable[[Path, int], Mapping[str, str]] = lambda queue, number: {},
    ) -> None:
        self._launch, self._folder = launch, folder.resolve()
        self._words, self._variables = words, variables
        self._leaving = contextlib.ExitStack()

    @property
    def count(self) -> int:
        """How many work."""
        return self._launch.workers

    @property
    def crew(self) -> Crew:
        """Those who were started."""
        return self._crew

    def __enter__(self) -> Team:
        own = self._folder / ".team"
        path, scratch = own / f"queue-{secrets.token_hex(4)}", own / "launcher"
        lock = FolderLock(own)
        for left in (*own.glob("queue-*"), scratch):  # of a team that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._queue = Queue(path)
        words = self._words(path)
        crew = Crew(self._launch, lambda number: (words, self._variables(path, number)), scratch, "a task")
        with self._leaving:
            self._leaving.enter_context(lock)
            self._leaving.enter_context(self._queue.led())
            self._crew = self._leaving.enter_context(crew)
            self._leaving = self._leaving.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving.close()

    def work(
        self,
        tasks: Mapping[str, Mapping[str, Any]],
        serve: Callable[[str, Callable[[], None]], None],
        tell: Callable[[set[str]], None],
    ) -> None:
        """Have all tasks done, by this process as well, and return when they are.

        Args:
            tasks: what is put into the queue, by name.
            serve: does the task of a name in this process; what it gets is to be called now and then.
            tell: called with the names of the tasks that are not done.

        Raises:
            UserError: a worker cannot work; see `Crew.check`.
        """

        def look() -> set[str]:
            left = self._queue.left()
            tell(left)
            self._crew.check(self._give_back)
            return left

        def keep_up() -> None:
            look()

        for name, task in tasks.items():
            self._queue.put(name, task)
        while look():
            taken = self._queue.take(LEADER)
            if taken is None:
                time.sleep(POLL_SECONDS)
                continue
            serve(taken.name, keep_up)
            taken.done()

    def _give_back(self, worker: str) -> bool:
        self._queue.give_back(worker)
        return self._queue.served(worker)


class Looking(Watch):
    """Looks after the others whenever the work of this process gets on."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def phase(self, name: str, done: int, total: int) -> None:
        self._look()
