"""Pictures, videos and earlier turns of one line of a JSONL task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avlprof.errors import UserError
from avlprof.tasks.turn import ROLES, Turn, VideoSource


def pictures_of(
    entry: Mapping[str, Any], where: str, folder: Path
) -> tuple[tuple[Path, ...], tuple[VideoSource, ...]]:
    """Pictures (`image` or `images`) and `videos` of a line or of one of its turns, none opened.

    Args:
        where: the place in the file, for messages.
        folder: what paths are relative to.

    Raises:
        UserError: both `image` and `images`, or a value that is no path or list of paths.
    """
    if "image" in entry and "images" in entry:
        raise UserError(f"{where}: must have either image (a path) or images (a list of paths)")
    images: tuple[Path, ...] = ()
    if "image" in entry:
        images = (folder / _path(entry["image"], f"{where}: image must be a path"),)
    elif "images" in entry:
        images = _paths(entry["images"], f"{where}: images must be a list of at least one path", folder)
    videos = entry.get("videos", [])
    wanted = f"{where}: videos must be a list of folders of frames, or of lists of their paths"
    if not isinstance(videos, list):
        raise UserError(f"{wanted}, got {shown(videos)}")
    return images, tuple(
        _paths(video, wanted, folder) if isinstance(video, list) else folder / _path(video, wanted)
        for video in videos
    )


def turns_of(entry: Mapping[str, Any], where: str, folder: Path) -> tuple[Turn, ...]:
    """The messages before the prompt: a list of objects with `role`, `text` and pictures.

    Raises:
        UserError: a turn is no such object; its number, field and value are named.
    """
    turns = entry.get("turns", [])
    if not isinstance(turns, list):
        raise UserError(f"{where}: turns must be a list of messages, got {shown(turns)}")
    return tuple(_turn(turn, f"{where}: turns[{index}]", folder) for index, turn in enumerate(turns))


def text_of(entry: Mapping[str, Any], field: str, where: str) -> str | None:
    """A text field, None where it is absent; `UserError` when it is something else."""
    value = entry.get(field)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {field} must be a text, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value as a message quotes it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _turn(entry: object, where: str, folder: Path) -> Turn:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with role and text, got {shown(entry)}")
    role = next((known for known in ROLES if known == entry.get("role")), None)
    if role is None:
        raise UserError(f"{where}: role must be user or assistant, got {shown(entry.get('role'))}")
    text = text_of(entry, "text", where)
    if text is None:
        raise UserError(f"{where}: text is missing")
    return Turn(role, text, *pictures_of(entry, where, folder))


def _paths(value: object, wanted: str, folder: Path) -> tuple[Path, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{wanted}, got {shown(value)}")
    return tuple(folder / _path(item, wanted) for item in value)


def _path(value: object, wanted: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{wanted}, got {shown(value)}")
    return value
