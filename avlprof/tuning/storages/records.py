"""The records of a journal, read past lines that are none."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult

STUDY: Final = "avlprof"
"""Optuna's name of the one study of a journal."""

_BEGINNING: Final = b'{"op_code"'  # of every record, also of one that was appended to a torn line
_BEGUN: Final = b'{"op_code":4,'  # of one that begins a trial
_log = logging.getLogger(__name__)
_warned: set[tuple[str, int]] = set()


@dataclass
class _Place:
    """How far a reader is, in records, bytes and lines."""

    records: int = 0
    offset: int = 0
    lines: int = 0


class MendedJournal(JournalFileBackend):
    """Optuna's journal, which sets aside what is no record, with a warning, in place of giving up.

    Two writers on a network file system, or a disk that was full, leave lines of which a part is
    missing; a newer Optuna writes operations that this one does not know. Whether a line is a record
    is asked of Optuna itself: every one is replayed beside the storage first. A record that was
    appended to a torn one is found again. The trial that a torn line began is begun all the same,
    since later lines name trials by their number.
    """

    def __init__(self, file_path: str, lock_obj: Any = None) -> None:
        super().__init__(file_path, lock_obj)
        self._path = Path(file_path)
        self._restart()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The records from a number on; a line without an end is being written, and left for later."""
        if log_number_from < self._place.records:
            self._restart()
        fresh, first = list[dict[str, Any]](), self._place.records
        with self._path.open("rb") as file:
            file.seek(self._place.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._place.offset += len(line)
                self._place.lines += 1
                fresh += self._records(line)
        self._place.records += len(fresh)
        yield from fresh[log_number_from - first :]

    def _restart(self) -> None:
        self._place, self._doubtful = _Place(), 0
        self._shadow = JournalStorageReplayResult("reader-")

    def _records(self, line: bytes) -> list[dict[str, Any]]:
        """What is to be replayed of a line; that something in it is no record is told."""
        whole = self._replayed(line)
        if whole:
            return whole
        records: list[dict[str, Any]] = []
        for piece in line.split(_BEGINNING):
            text = _BEGINNING + piece
            more = self._replayed(text)
            if not more and text.replace(b" ", b"").startswith(_BEGUN):
                more = [self._begun()]
            elif not more:
                self._doubtful += 1
            records += more
        self._tell()
        return records

    def _replayed(self, text: bytes) -> list[dict[str, Any]]:
        """The record in a text, behind trials that it needs; nothing where Optuna cannot replay it."""
        try:
            record = dict(json.loads(text))
            if type(record["op_code"]) is not int or not isinstance(record["worker_id"], str):
                return []
            JournalOperation(record["op_code"])
            before = self._lost(record)
            self._shadow.apply_logs([record])
        except Exception:  # whatever Optuna stumbles over
            return []
        return [*before, record]

    def _lost(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """What a record builds on that stood in damaged lines: the study, or a trial."""
        if not self._doubtful or record["op_code"] == JournalOperation.CREATE_STUDY:
            return []
        studies = self._shadow.get_all_studies()
        if not studies:
            self._doubtful -= 1
            return [self._put({"op_code": 0, "study_name": STUDY, "directions": [1]})]
        trials = sum(len(self._shadow.get_all_trials(study._study_id, None)) for study in studies)
        lost = record.get("trial_id", -1) + 1 - trials
        if not 0 < lost <= self._doubtful:
            return []
        self._doubtful -= lost
        return [self._begun() for _ in range(lost)]

    def _begun(self) -> dict[str, Any]:
        """In place of a lost line that began a trial; what later lines say of the trial still counts."""
        now = datetime.datetime.now().isoformat(timespec="microseconds")
        return self._put({"op_code": 4, "study_id": 0, "datetime_start": now})

    def _put(self, record: dict[str, Any]) -> dict[str, Any]:
        record["worker_id"] = ""
        self._shadow.apply_logs([record])
        return record

    def _tell(self) -> None:
        where = (str(self._path), self._place.lines)
        if where not in _warned:
            _warned.add(where)
            _log.warning(
                "line %d of %s is damaged, or of a newer Optuna, and is set aside; all others count",
                self._place.lines,
                self._path,
            )
