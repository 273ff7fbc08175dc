"""Tasks from a file of samples: JSON lines, JSON, tables, parquet and tar archives."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from avlprof.errors import UserError
from avlprof.tasks.fields import usual, warn_unused
from avlprof.tasks.record import Record, Row, check_columns_of, record_of
from avlprof.tasks.rows import read_rows
from avlprof.tasks.sample import Sample
from avlprof.tasks.source import missing
from avlprof.tasks.splits import ALL, HELD_OUT, SEARCH, half_of
from avlprof.tasks.task import Task
from avlprof.tasks.text import LONGEST_PATH, printable, shorten
from avlprof.tasks.video import natural


def file_task(path: Path, columns: Mapping[str, str] | None = None) -> Task:
    """The task of a file, or of a folder of tar archives; `docs/tasks.md` describes the forms.

    The whole file is checked at once, but for the pictures: that one exists is checked when its
    sample is drawn. Fields that nothing reads are named in one warning.

    Args:
        columns: fields of a sample that have other names in the file.

    Raises:
        UserError: something in the file is wrong; place, field and value are named.
    """
    files = _archives(path) if os.path.isdir(path) else [path]
    rows = [row for file in files for row in read_rows(file)]
    if len(files) > 1:
        rows = [dataclasses.replace(row, number=str(index)) for index, row in enumerate(rows, start=1)]
    if columns:
        check_columns_of(rows[0], columns)
    records = _records(rows, columns or {})
    split_of = {r.sample.id: r.split for r in records if r.split is not None}
    if split_of and len(split_of) < len(records):
        bare = next(r for r in records if r.split is None)
        raise UserError(
            f"{bare.where}: split is missing, though other lines have one; give all of them or none"
        )
    splits = tuple(dict.fromkeys(split_of.values())) if split_of else (SEARCH, HELD_OUT)
    counts = Counter(_split(record) for record in records)
    warn_unused(str(path), {name for record in records for name in record.unused})
    return Task(
        name=path.stem,
        metric="exact_match",
        splits=(*splits, ALL),
        stream=partial(_stream, records),
        provenance={"file": path.name, "sha256": _digest(files)},
        counts={split: counts[split] for split in splits} | {ALL: len(records)},
    )


def holds_archives(folder: str) -> bool:
    """Whether a folder is a WebDataset of tar archives, without an index that `datasets` reads."""
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except (OSError, ValueError):  # no folder, or no name that a file system could have
        return False
    return any(name.endswith(".tar") for name in names) and not any(
        name.endswith((".parquet", ".arrow", ".csv", ".jsonl")) for name in names
    )


def _archives(folder: Path) -> list[Path]:
    paths = [path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith(".")]
    return list(natural(paths, f"folder {folder}"))


def _records(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Record]:
    keyed = "id" in columns or not _repeats(rows)
    records: list[Record] = []
    seen: dict[str, str] = {}
    for row in rows:
        record = record_of(row, columns, keyed)
        name = record.sample.id
        if name in seen:
            raise UserError(
                f"{record.where}: id '{printable(shorten(name))}' is taken already by {seen[name]}; "
                "make ids unique, or leave them out"
            )
        seen[name] = record.where
        records.append(record)
    return records


def _repeats(rows: Sequence[Row]) -> bool:
    """Whether ids come from a field that is an id by custom alone (`index`) and repeat."""
    names = [
        usual("id", tuple(name for name, value in row.values.items() if value is not None)) for row in rows
    ]
    if "id" in names or None in names:
        return False
    values = [str(row.values[str(name)]) for row, name in zip(rows, names, strict=True)]
    return len(set(values)) < len(rows)


def _split(record: Record) -> str:
    return record.split or half_of(record.picture or record.sample.id)


def _stream(records: Sequence[Record], split: str) -> Iterator[Sample]:
    for record in records:
        if split in (ALL, _split(record)):
            _check_files(record)
            yield record.sample


def _check_files(record: Record) -> None:
    for turn in record.sample.conversation():
        for image in turn.images:
            if isinstance(image, Path) and not os.path.isfile(image):
                raise _no_picture(image, f"{record.where}: image")
        for video in turn.videos:
            if isinstance(video, Path) and not os.path.exists(video):
                raise missing(video, f"{record.where}: video")


def _no_picture(path: Path, name: str) -> UserError:
    if os.path.isdir(path):
        return UserError(
            f"{name} {printable(shorten(path, LONGEST_PATH))} is a folder; give a picture, or a video"
        )
    return missing(path, name)


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
