"""What the tables of a run directory hold, checked once before a part is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from avlprof.runs.meta import RunMeta, unreadable

Kind = tuple[str, Callable[[Any], bool]]


def _is_text(kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_list(kind: Any, of: Callable[[Any], bool]) -> bool:
    listed = types.is_list(kind) or types.is_large_list(kind)
    return bool(listed and (of(kind.value_type) or types.is_null(kind.value_type)))


def _is_number(kind: Any) -> bool:
    return bool(types.is_floating(kind) or types.is_integer(kind))


TEXT: Final[Kind] = ("text", _is_text)
WHOLE: Final[Kind] = ("whole numbers", lambda kind: bool(types.is_integer(kind)))
NUMBER: Final[Kind] = ("numbers", lambda kind: _is_number(kind) or bool(types.is_null(kind)))
TEXTS: Final[Kind] = ("lists of texts", lambda kind: _is_list(kind, _is_text))
NUMBERS: Final[Kind] = ("lists of numbers", lambda kind: _is_list(kind, _is_number))

SAMPLES: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("sample", "group", "prompt", "answer"), TEXT),
    "references": TEXTS,
    "tiles": TEXT,
    **dict.fromkeys(("system", "vision", "text", "generated"), WHOLE),
}
STATS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("sample", "phase", "query"), TEXT),
    **dict.fromkeys(("layer", "head", "rows"), WHOLE),
    "distance": NUMBERS,
    **dict.fromkeys(("mass_system", "mass_vision", "mass_text", "mass_generated"), NUMBER),
    **dict.fromkeys(("mass_sink", "entropy", "text_sink"), NUMBER),
}


FURTHER: Final[Mapping[str, Kind]] = {"tokens": TEXTS, "text_tokens": TEXTS, "seconds": NUMBER}
"""Columns of `samples` that a run can do without."""


def check_part(folder: Path, part: str, meta: RunMeta, whole: bool = False) -> None:
    """`UserError` where a table of a part is missing, cannot be read, or holds something else or no UTF-8.

    With `whole` every column that an analysis asks for must be there, else ids alone.
    """
    levels = [f"coverage_{level}" for level in meta.coverages] + [f"overlap_{lag}" for lag in meta.lags]
    stats = {**STATS, **dict.fromkeys(levels, NUMBER)}
    for kind, needed, more in (("samples", SAMPLES, FURTHER), ("stats", stats, {})):
        _check(folder / f"{kind}-{part}.parquet", {**needed, **more}, set(needed) if whole else {"sample"})
    _check_texts(folder / f"samples-{part}.parquet")


def _check_texts(path: Path) -> None:
    """`UserError` where a text is no UTF-8, which parquet does not see to."""
    try:
        pq.read_table(path).validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from None


def _check(path: Path, columns: Mapping[str, Kind], needed: Set[str]) -> None:
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from None
    for name, (what, fits) in columns.items():
        index = schema.get_field_index(name)
        if index < 0 and name not in needed:
            continue
        if index < 0:
            raise unreadable(path, ValueError(f"it has no column '{name}'"))
        kind = schema.field(index).type
        if not fits(kind):
            raise unreadable(path, ValueError(f"column '{name}' must hold {what}, got {kind}"))
