"""Reading the cells of a Hugging Face dataset: pictures in their usual forms."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from avlprof.errors import UserError
from avlprof.tasks.picture import PictureLimits, check_header, open_picture, reading
from avlprof.tasks.source import picture_source
from avlprof.tasks.text import LONGEST_PATH, printable, shorten

Pictures = tuple[Callable[[], Image.Image], ...]


def pictures_in(rows: Any, index: int, column: str, where: str, folder: Path | None = None) -> Pictures:
    """Functions that decode the pictures of a cell, which is one picture or a list of them.

    `rows` is a `datasets.Dataset` without other columns; nothing is decoded here. A picture may
    be an `Image` feature, a path (relative to `folder`), a data URI, base64 or encoded bytes.
    `where` begins the message of `UserError`.
    """
    cell = rows.with_format("arrow")[index][column][0]
    if not cell.is_valid:
        raise UserError(f"{where}: there is no picture")
    count = len(cell) if hasattr(cell, "values") and not hasattr(cell, "keys") else None
    if count == 0:
        raise UserError(f"{where}: the list of pictures is empty")
    feature = picture_feature(rows.features[column])

    def opened(position: int | None) -> Image.Image:
        raw = rows.with_format("arrow")[index][column][0].as_py()
        return _decoded(raw if position is None else raw[position], feature, where, folder)

    return tuple(partial(opened, position) for position in ([None] if count is None else range(count)))


def pictures_of(cell: Any, feature: Any, where: str) -> Pictures:
    """As `pictures_in`, for a cell of a stream, whose bytes are in memory and not decoded."""
    if cell is None:
        raise UserError(f"{where}: there is no picture")
    cells = list(cell) if isinstance(cell, list | tuple) else [cell]
    if not cells:
        raise UserError(f"{where}: the list of pictures is empty")
    return tuple(partial(_decoded, item, picture_feature(feature), where, None) for item in cells)


def picture_feature(feature: Any) -> Any:
    """The `Image` feature of a column of pictures or of lists of them; None for other columns."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature if hasattr(feature, "decode_example") else None


def undecoded(feature: Any) -> Any:
    """The feature of a column whose pictures stay encoded."""
    plain = copy.deepcopy(feature)
    inner = picture_feature(plain)
    if inner is not None:
        inner.decode = False
    return plain


def _decoded(value: Any, feature: Any, where: str, folder: Path | None) -> Image.Image:
    """The picture of a cell, by the dataset's own decoder where it has one, its header checked before."""
    name = f"{where}: the picture"
    if isinstance(value, dict) and value.get("bytes") is not None:
        encoded = value["bytes"]
    elif isinstance(value, dict) and "://" in str(value.get("path")) and feature is not None:
        return _by_feature(value, feature, name)  # a file within the hub, which its own reader knows
    else:
        path = value.get("path") if isinstance(value, dict) else value
        try:
            source = picture_source(path, folder or Path(), name)
        except UserError as error:
            raise UserError(f"{name} cannot be read: {error}") from None
        if not isinstance(source, Path):
            return open_picture(source, name)
        if not os.path.isfile(source):
            text = printable(shorten(source, LONGEST_PATH))
            raise UserError(f"{name} cannot be read: {text} does not exist")
        encoded, value = source, {"bytes": None, "path": str(source)}
    if feature is None:
        return open_picture(encoded, name)
    check_header(encoded, name)
    return _by_feature(value, feature, name)


def _by_feature(value: Any, feature: Any, name: str) -> Image.Image:
    whole = copy.copy(feature)
    whole.decode = True
    with reading(name, PictureLimits.from_environment().pixels):
        picture = whole.decode_example(value)
    return open_picture(picture, name)
