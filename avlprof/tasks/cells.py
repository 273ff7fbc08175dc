"""Reading the cells of a Hugging Face dataset: answers and pictures in their usual forms."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from avlprof.errors import UserError


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


def pictures_in(rows: Any, index: int, column: str, where: str) -> tuple[Callable[[], Image.Image], ...]:
    """Functions that decode the pictures of a cell, which is one picture or a list of them.

    `rows` is a `datasets.Dataset` without other columns; nothing is decoded here. A picture may
    be an `Image` feature, a path, or encoded bytes. `where` begins the message of `UserError`.
    """
    cell = rows.with_format("arrow")[index][column][0]
    if not cell.is_valid:
        raise UserError(f"{where}: there is no picture")
    count = len(cell) if hasattr(cell, "values") and not hasattr(cell, "keys") else None
    if count == 0:
        raise UserError(f"{where}: the list of pictures is empty")
    places = [None] if count is None else range(count)
    return tuple(partial(_open, rows, index, column, place, where) for place in places)


def _open(rows: Any, index: int, column: str, place: int | None, where: str) -> Image.Image:
    try:
        cell = rows[index][column]
        return _decoded(cell if place is None else cell[place])
    except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: the picture cannot be read: {error}") from None


def _decoded(value: object) -> Image.Image:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, bytes):
        value = io.BytesIO(value)
    elif isinstance(value, str):
        value = Path(value)
    else:
        raise TypeError(f"expected a picture, a path or bytes, got {type(value).__name__}")
    with Image.open(value) as image:
        return image.convert("RGB")
