"""Rows of files that hold pictures beside texts: parquet, and the tar archives of WebDataset."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from avlprof.errors import UserError
from avlprof.tasks.record import Row
from avlprof.tasks.source import EncodedPicture
from avlprof.tasks.text import parse_json, quoted, shorten
from avlprof.tasks.video import FRAMES

_TEXTS = {"txt": "txt", "cls": "label", "caption": "caption"}


def parquet_rows(path: Path) -> list[Row]:
    """Rows of a parquet file; encoded pictures stay in its columns until they are opened.

    Raises:
        UserError: the file is damaged, or a text in it is not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _readable(path):
        table = pq.read_table(path)
        heavy = [field.name for field in table.schema if _holds_bytes(field.type, pa)]
        texts = table.drop_columns(heavy).to_pylist() if len(heavy) < table.num_columns else None
        rows = texts if texts is not None else [{} for _ in range(table.num_rows)]
    return [_parquet_row(path, number, values, table, heavy) for number, values in enumerate(rows)]


def _parquet_row(path: Path, number: int, values: dict[str, Any], table: Any, heavy: list[str]) -> Row:
    where = f"{path}: row {number + 1}"
    pictures = {name: _picture(table.column(name)[number], f"{where}: {name}") for name in heavy}
    return Row(where, str(number + 1), {**values, **pictures}, path.parent, typed=True)


def _holds_bytes(kind: Any, pa: Any) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type, pa)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _picture(cell: Any, name: str) -> Any:
    """What `picture_source` takes, for a cell of bytes, of a record with bytes and path, or a list."""
    if not cell.is_valid:
        return None
    if hasattr(cell, "keys"):
        encoded = cell["bytes"]
        path = cell["path"].as_py() if "path" in cell else None
        return EncodedPicture(name, encoded.as_py) if encoded.is_valid else path
    if hasattr(cell, "values"):
        return [_picture(item, f"{name}[{index}]") for index, item in enumerate(cell.values or ())]
    return EncodedPicture(name, cell.as_py)


def tar_rows(path: Path) -> list[Row]:
    """Rows of a WebDataset archive: members that share a name up to its first point are one row.

    Pictures stay in the archive until they are opened; nothing is unpacked. The fields of `.json`
    members are those of the row; several pictures are in the order of their endings.
    Source: https://github.com/webdataset/webdataset, section "The WebDataset Format".

    Raises:
        UserError: the archive is damaged or compressed, or a text in it cannot be read.
    """
    rows: dict[str, dict[str, Any]] = {}
    with _readable(path), tarfile.open(path, "r:") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if member.isfile() and not name.name.startswith("."):
                stem, _, ending = name.name.partition(".")
                key = str(name.parent / stem)
                _add(rows.setdefault(key, {"__key__": key}), member, ending.lower(), path)
    return [
        Row(f"{path}: {shorten(key)}", str(number), _ordered(values), path.parent)
        for number, (key, values) in enumerate(rows.items(), start=1)
    ]


def _add(values: dict[str, Any], member: tarfile.TarInfo, ending: str, path: Path) -> None:
    where = f"{path}: {shorten(member.name)}"
    read = partial(_bytes, path, member.offset_data, member.size)
    last = ending.rpartition(".")[2]
    if f".{last}" in FRAMES:
        values.setdefault("image", []).append((ending, EncodedPicture(where, read)))
    elif last == "json":
        entry = parse_json(_utf8(read(), where), where)
        if not isinstance(entry, dict):
            raise UserError(f"{where}: must be a JSON object, got {quoted(entry)}")
        # the pictures of the archive are meant; the record's own image is where they came from
        values.update({name: value for name, value in entry.items() if name not in ("image", "images")})
    elif last in _TEXTS:
        values[_TEXTS[last]] = _utf8(read(), where).strip()


def _ordered(values: dict[str, Any]) -> dict[str, Any]:
    pictures = [picture for _, picture in sorted(values.get("image", []), key=lambda pair: str(pair[0]))]
    if not pictures:
        return values
    return {**values, "image": pictures if len(pictures) > 1 else pictures[0]}


def _bytes(path: Path, offset: int, size: int) -> bytes:
    with _readable(path), path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} cannot be read as UTF-8 text: {shorten(error)}") from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of parquet and tar readers, which are of many kinds, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"task file {path} cannot be read as {os.path.splitext(path)[1][1:]}: {shorten(error, 160)}; "
            "fetch it again"
        ) from None
