"""Fields of a sample, named alike in every kind of file and dataset, and answers in all their forms."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from avlprof.errors import UserError
from avlprof.registry import unknown
from avlprof.tasks.text import listed, quoted

_log = logging.getLogger(__name__)

FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "image": (
        *("image", "images", "image_path", "image_file", "image_url", "img", "img_path", "imgname"),
        *("file_name", "jpg", "jpeg", "png", "webp"),
    ),
    "prompt": ("prompt", "question", "query", "instruction", "text"),
    "answers": (
        *("answers", "answer", "label", "labels", "reference", "references", "ground_truth"),
        *("multiple_choice_answer",),
    ),
    "id": ("id", "question_id", "questionId", "sample_id", "index", "pid", "qid", "__key__"),
    "group": ("group", "category"),
    "picture": (),
}
"""For every field of a sample: the names that are taken for it, the first that is there, where
the user names none. `picture` tells pictures apart (samples that share one go to one half)."""

CHATS: Final = ("conversations", "messages", "conversation")
"""Fields that hold a whole conversation, in the forms of LLaVA or of OpenAI's API."""

EXAMPLE: Final = "image=picture,prompt=question,answers=labels"


def parse_columns(text: str) -> dict[str, str]:
    """A column map from `image=picture,prompt=question`: field of a sample -> column.

    Fields are image, prompt, answers, id, group and picture. `UserError` names a part that is not
    FIELD=COLUMN, an unknown field, or one that is given twice.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not (field and equals and column):
            raise UserError(f"columns must be FIELD=COLUMN,..., got '{part.strip()}' in '{text}'")
        if field in columns:
            raise UserError(f"columns names field '{field}' twice in '{text}'")
        columns[field] = column
    check_columns(columns)
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    """`UserError` for a key that is no field of a sample, with near ones."""
    for field in columns:
        if field not in FIELDS:
            raise unknown("field of columns", field, FIELDS)


def column_map(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """A column map from what a user gives: its text, a map, or nothing."""
    if isinstance(columns, str):
        return parse_columns(columns)
    check_columns(columns or {})
    return dict(columns or {})


@lru_cache(maxsize=1024)
def usual(field: str, names: tuple[str, ...]) -> str | None:
    """The name among `names` that is taken for a field when the user names none."""
    return next((name for name in FIELDS[field] if name in names), None)


def value_at(values: Mapping[str, object], name: str) -> object:
    """A value by its name, or by a name with points that leads into records (`json.question`)."""
    if name in values:
        return values[name]
    head, point, rest = name.partition(".")
    inner = values.get(head)
    return value_at(inner, rest) if point and isinstance(inner, dict) else None


def warn_unused(source: str, names: Iterable[str]) -> None:
    """One warning for fields of a file that nothing reads."""
    names = sorted(set(names))
    if names:
        _log.warning(
            "%s: not used: %s (fields of a sample are called %s; docs/tasks.md has their other names)",
            *(source, listed(names)),
            "id, image, images, videos, turns, prompt, answers, split, group",
        )


def answers_in(cell: object) -> tuple[str, ...]:
    """The answers in a cell: a text, a number, a list of them, or VQAv2's and SQuAD's records.

    Records are dictionaries with the key `answer` or `text`, alone, in a list, or as a
    dictionary of lists. Nothing, also within a list, is no answer.
    """
    if cell is None:
        return ()
    if isinstance(cell, dict):
        return answers_in(cell.get("answer", cell.get("text")))
    if isinstance(cell, list | tuple):
        return tuple(answer for item in cell for answer in answers_in(item))
    return (str(cell),)


def written_answers(value: object, name: str) -> tuple[str, ...]:
    """The answers in a field of a JSON file, where a number is refused: 1 and 1.0 are two texts.

    `name` begins the message of `UserError`, as `mine.jsonl:3: answers`.
    """
    if isinstance(value, list) and all(type(item) is str for item in value):
        return tuple(value)
    if not _is_text(value):
        raise UserError(f"{name} must be a text or a list of texts, got {quoted(value)}")
    return answers_in(value)


def _is_text(value: object) -> bool:
    if isinstance(value, dict):
        return _is_text(value.get("answer", value.get("text")))
    if isinstance(value, list):
        return all(item is not None and _is_text(item) for item in value)
    return value is None or isinstance(value, str)
