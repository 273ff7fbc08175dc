"""Tasks from a file with one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from avlprof.errors import UserError
from avlprof.tasks.jsonl_turns import pictures_of, shown, text_of, turns_of
from avlprof.tasks.sample import Sample
from avlprof.tasks.splits import ALL, HELD_OUT, SEARCH, half_of
from avlprof.tasks.task import Task


@dataclass(frozen=True)
class _Record:
    where: str  # file:line, for messages
    sample: Sample
    split: str | None


def jsonl_task(path: Path) -> Task:
    """The task of a JSONL file; `docs/tasks.md` describes the fields.

    The whole file is checked at once, but for the pictures: that one exists is checked when its
    sample is drawn. `UserError` names file, line, field and value.
    """
    records = _read(path)
    split_of = {r.sample.id: r.split for r in records if r.split is not None}
    if split_of and len(split_of) < len(records):
        bare = next(r for r in records if r.split is None)
        raise UserError(
            f"{bare.where}: split is missing, though other lines have one; give all of them or none"
        )
    splits = tuple(dict.fromkeys(split_of.values())) if split_of else (SEARCH, HELD_OUT)
    return Task(path.stem, "exact_match", (*splits, ALL), partial(_stream, records))


def _stream(records: list[_Record], split: str) -> Iterator[Sample]:
    for record in records:
        if split in (ALL, record.split or half_of(record.sample.id)):
            for turn in record.sample.conversation():
                for image in turn.images:
                    if isinstance(image, Path) and not image.is_file():
                        raise UserError(f"{record.where}: image {image} does not exist")
                for video in turn.videos:
                    if isinstance(video, Path) and not video.exists():
                        raise UserError(f"{record.where}: video {video} does not exist")
            yield record.sample


def _read(path: Path) -> list[_Record]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"task file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task file {path} cannot be read as UTF-8 text: {error}") from None
    records: list[_Record] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line, number, path)
        if record.sample.id in seen:
            raise UserError(
                f"{record.where}: id '{record.sample.id}' is taken already by {seen[record.sample.id]}"
            )
        seen[record.sample.id] = record.where
        records.append(record)
    if not records:
        raise UserError(f"task file {path} holds no samples")
    return records


def _record(line: str, number: int, path: Path) -> _Record:
    where = f"{path}:{number}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object ({error.msg} at column {error.colno})") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a JSON object, got {shown(entry)}")
    name = entry.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"{where}: id must be text or a whole number, got {shown(name)}")
    prompt = text_of(entry, "prompt", where)
    if prompt is None or not prompt.strip():
        raise UserError(f"{where}: prompt must be a text that is not empty, got {shown(prompt)}")
    split = text_of(entry, "split", where)
    if split in (ALL, ""):
        raise UserError(f"{where}: split must be a name other than '{ALL}', got {shown(split)}")
    images, videos = pictures_of(entry, where, path.parent)
    turns = turns_of(entry, where, path.parent)
    if not any((images, videos, *(turn.images or turn.videos for turn in turns))):
        raise UserError(f"{where}: must have either image (a path) or images (a list of paths), or videos")
    sample = Sample(
        id=str(name),
        images=images,
        prompt=prompt,
        answers=_answers(entry, where),
        group=text_of(entry, "group", where) or "",
        videos=videos,
        turns=turns,
    )
    return _Record(where, sample, split)


def _answers(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    given = entry.get("answers", [])
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise UserError(f"{where}: answers must be a text or a list of texts, got {shown(given)}")
    return tuple(answers)
