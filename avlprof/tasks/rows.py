"""The rows of a file of samples: JSON lines, JSON, tables, parquet, tar archives."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from avlprof.errors import UserError
from avlprof.tasks.record import Row
from avlprof.tasks.text import LONGEST_PATH, listed, parse_json, printable, quoted, shorten

_LISTS = ("data", "questions", "annotations", "samples", "examples", "rows", "train", "test", "validation")
_VQA = (("questions", "annotations"), ("OpenEnded_", ""), ("MultipleChoice_", ""))
_PACKED = "a packed file; unpack it and give the file of samples in it"
_ADVICE: Final[dict[str, str]] = {
    **dict.fromkeys((".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), _PACKED),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic"),
                    "a picture; ask about it with --image and --prompt"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm"),
                    "a film; name it in the field videos of a .jsonl file"),
    **dict.fromkeys((".yaml", ".yml"), "a YAML file, such as a policy; give a task"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "a spreadsheet; save it as .csv or .tsv"),
    **dict.fromkeys((".arrow", ".feather"), "a part of a dataset; give the folder that save_to_disk wrote"),
    **dict.fromkeys((".pt", ".pth", ".pkl", ".npz", ".npy", ".h5", ".safetensors", ".bin"),
                    "no file of samples; write one JSON object a line to a .jsonl file"),
}  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in order, with the pictures of parquet and tar not yet read.

    Raises:
        UserError: the file is of another kind, cannot be read, or is malformed; place and remedy
            are named.
    """
    ending = path.suffix.lower()
    if not os.path.isfile(path):
        raise UserError(f"task file {printable(shorten(path, LONGEST_PATH))} does not exist")
    readers: dict[str, Callable[[Path], list[Row]]] = {
        **dict.fromkeys((".jsonl", ".ndjson", ".json", ".txt", ""), _json_rows),
        ".tsv": lambda file: _table_rows(file, "\t"),
        ".csv": lambda file: _table_rows(file, ","),
        ".parquet": _parquet_rows,
        ".tar": _tar_rows,
    }
    if ending in _ADVICE or ending not in readers:
        what = _ADVICE.get(
            ending, "a kind of file that is not read; give .jsonl, .json, .tsv, .csv, .parquet or .tar"
        )
        raise UserError(f"task file {path} is {what}")
    rows = readers[ending](path)
    if not rows:
        raise UserError(f"task file {path} holds no samples")
    return rows


def readable(path: Path) -> bool:
    """Whether a file has an ending that `read_rows` reads or can say something about."""
    known = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet", ".tar")
    return path.suffix.lower() in (*known, *_ADVICE)


def _parquet_rows(path: Path) -> list[Row]:
    from avlprof.tasks.archive import parquet_rows

    return parquet_rows(path)


def _tar_rows(path: Path) -> list[Row]:
    from avlprof.tasks.archive import tar_rows

    return tar_rows(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task file {path} cannot be read as UTF-8 text: {shorten(error)}") from None


def _json_rows(path: Path) -> list[Row]:
    """Rows of JSON: one value over the whole file, or one object a line, whatever the file is called."""
    text = _text(path)
    lines = text.split("\n")
    first = next((line.strip() for line in lines if line.strip()), "")
    if first and path.suffix.lower() != ".jsonl" and first[0] not in "[{":
        raise UserError(f"{path}: not a file of samples, it begins with {quoted(first)}; give JSON objects")
    whole = first[:1] == "[" or first == "{" or (first[:1] == "{" and not first.endswith("}"))
    if whole or (path.suffix.lower() == ".json" and sum(bool(line.strip()) for line in lines) == 1):
        try:
            value = parse_json(text, str(path))
        except UserError:
            if path.suffix.lower() == ".json" or sum(bool(line.strip()) for line in lines) == 1:
                raise
        else:
            return list(_values(value, path))
    return [
        _row(parse_json(line, f"{path}:{number}"), f"{path}:{number}", str(number), path)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _row(entry: object, where: str, number: str, path: Path) -> Row:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a JSON object, got {quoted(entry)}")
    return Row(where, number, entry, path.parent)


def _values(value: object, path: Path) -> Iterator[Row]:
    """Rows of a whole JSON file: a list, an object that holds one, or objects by their ids."""
    if isinstance(value, dict):
        value = _list_in(value, path)
    if isinstance(value, dict):
        for key, entry in value.items():
            yield _row(entry, f"{path}: entry {quoted(key)}", key, path)
        return
    assert isinstance(value, list)
    for number, entry in enumerate(value, start=1):
        yield _row(entry, f"{path}: entry {number}", str(number), path)


def _list_in(value: dict[str, Any], path: Path) -> list[Any] | dict[str, Any]:
    if isinstance(value.get("questions"), list):
        return _vqa(value, path)
    name = next((name for name in _LISTS if isinstance(value.get(name), list)), None)
    if name == "annotations":
        raise UserError(
            f"{path} holds annotations without their questions (fields {listed(value)}); "
            "give the file of questions, with this one beside it"
        )
    if name is not None:
        return list(value[name])
    if len(value) > 1 and all(isinstance(entry, dict) for entry in value.values()):
        return value
    if any(isinstance(item, str) for item in value.values()):
        return [value]
    raise UserError(f"{path} is a JSON object with the fields {listed(value)}; give a list of samples")


def _vqa(value: dict[str, Any], path: Path) -> list[Any]:
    """The questions of VQAv2 with their annotations, from the same file or from the one beside it."""
    annotations = value.get("annotations")
    if annotations is None:
        beside = next((file for file in _beside(path) if file != path and os.path.isfile(file)), None)
        if beside is not None:
            held = parse_json(_text(beside), str(beside))
            annotations = held.get("annotations") if isinstance(held, dict) else None
    shared = {name: value[name] for name in ("data_subtype",) if isinstance(value.get(name), str)}
    if annotations is None:
        return [shared | entry if isinstance(entry, dict) else entry for entry in value["questions"]]
    if not isinstance(annotations, list):
        raise UserError(f"{path}: annotations must be a list, got {quoted(annotations)}")
    answers = {
        a["question_id"]: a for a in annotations if isinstance(a, dict) and _is_id(a.get("question_id"))
    }
    rows: list[Any] = []
    for number, entry in enumerate(value["questions"], start=1):
        key = entry.get("question_id") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not _is_id(key) or key not in answers:
            raise UserError(
                f"{path}: question {number} ({quoted(key)}) has no annotation; give one to each or to none"
            )
        rows.append(shared | answers[key] | entry)
    return rows


def _is_id(value: object) -> bool:
    return isinstance(value, str | int)


def _beside(path: Path) -> Iterator[Path]:
    """Where annotations lie: `questions` in the name becomes `annotations`, with the task or without."""
    name = path.name.replace(*_VQA[0])
    yield path.with_name(name)
    for shorter in _VQA[1:]:
        yield path.with_name(name.replace(*shorter))


def _table_rows(path: Path, mark: str) -> list[Row]:
    """Rows of a table with a head line; a text of a cell is its text, an empty cell is nothing."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=mark, strict=True)
            return list(_cells(reader, path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task file {path} cannot be read as UTF-8 text: {shorten(error)}") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a table with quoted cells ({shorten(error)})") from None
    finally:
        csv.field_size_limit(before)


def _cells(reader: Any, path: Path) -> Iterator[Row]:
    names: Sequence[str] = next(reader, [])
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a column is there twice among {listed(names)}")
    if len(names) == 1:
        raise UserError(
            f"{path}: one column alone ({listed(names)}); put commas between columns, or tabs in .tsv"
        )
    rows: list[Row] = []
    for cells in reader:
        if not any(cells):
            continue
        where = f"{path}:{reader.line_num}"
        if len(cells) != len(names):
            raise UserError(
                f"{where}: {len(cells)} cells under {len(names)} columns ({listed(names)}); quote its texts"
            )
        values: Mapping[str, str | None] = {n: c or None for n, c in zip(names, cells, strict=True)}
        rows.append(Row(where, str(len(rows) + 1), values, path.parent))
    yield from _shared_pictures(rows)


def _shared_pictures(rows: list[Row]) -> Iterator[Row]:
    """Rows of which a short `image` names the row whose picture it is, as MMBench's tables do."""
    by_index = {row.values["index"]: row for row in rows if row.values.get("index")}
    for row in rows:
        image = row.values.get("image")
        other = by_index.get(image) if image and image.isdecimal() else None
        if other is None or image is None or (row.folder / image).is_file():
            yield row
        else:
            yield Row(row.where, row.number, {**row.values, "image": other.values.get("image")}, row.folder)
