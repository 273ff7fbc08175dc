"""The run directory: parts that are written whole, read as one.

A part is `scores-<part>.safetensors`, `stats-<part>.parquet` and `samples-<part>.parquet`; the
last is written last and makes the part count. A killed process loses at most the part in hand,
and what it left behind is written over.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.numpy import safe_open, save_file

from avlprof.errors import UserError
from avlprof.files import replacing
from avlprof.locks import FolderLock, uninterrupted
from avlprof.runs.columns import check_part
from avlprof.runs.meta import (
    HEADS,
    LEARNED_SINK,
    RunMeta,
    check_free,
    read_meta,
    settle_meta,
    unreadable,
)

Scores = dict[str, NDArray[np.float32]]


class RunDirectory:
    """A traced run on disk.

    Tables:
        samples: one row a sample: `sample, group, prompt, references, answer, tokens, text_tokens, system,
            vision, text, generated, tiles, seconds`; `tiles` is JSON, for `avlprof.models.tiles.parse_tiles`.
        stats: one row per `sample, layer, head, phase, query`, where `query` names the query
            rows averaged over: `system`, `vision`, `text` or `last` in prefill, `generated`
            while decoding. Columns: `rows` (how many), `mass_system`, `mass_vision`,
            `mass_text`, `mass_generated` and `mass_learned_sink` (what the model's learned attention
            sinks drew; sum 1), `mass_sink` (first position), `entropy` (nat),
            `coverage_50` ... (vision tokens), `text_sink` and `distance` (mass on the first text
            tokens, and list of masses by distance in text tokens on the others), `overlap_1` ...
            (share of the top set kept after that many decoding steps; NaN in prefill).
        scores: per sample the head-mean attention that vision tokens received, fp32: `last` and
            `instruction` `[layers, vision]`, `decode [steps, layers, vision]`; with every row
            recorded also `all [layers, vision]`, and with `history` of the text tokens
            `history [layers, text]`, and with `text_rows` of the prompt's text rows one by one
            `text [text tokens, layers, vision]`. In a run of all heads each of them stands there
            head by head as well: `last_heads [layers, heads, vision]`, `decode_heads [steps,
            layers, heads, vision]` and so on.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._checked: set[str] = set()
        if not (self.path / "meta.json").is_file():
            raise UserError(
                f"{self.path} is not a run directory (no meta.json); make one with 'avlprof trace'"
            )

    @cached_property
    def meta(self) -> RunMeta:
        """Settings of the run."""
        return read_meta(self.path)

    def parts(self) -> list[str]:
        """Names of the finished parts, in order; their columns are checked when they are first seen.

        Raises:
            UserError: a table lacks a column, or a column holds something else.
        """
        parts = sorted(p.stem.removeprefix("samples-") for p in self.path.glob("samples-*.parquet"))
        for part in parts:
            if part not in self._checked:
                check_part(self.path, part, self.meta)
                self._checked.add(part)
        return parts

    def check(self) -> None:
        """`UserError` where a table lacks a column that an analysis asks for, or is none."""
        meta = self.meta
        for part in self.parts():
            check_part(self.path, part, meta, whole=True)

    def samples(self) -> pd.DataFrame:
        """One row a traced sample, in the order of the parts."""
        return self._table("samples")

    def stats(self) -> pd.DataFrame:
        """Attention statistics, one row per sample, layer, head, phase and kind of query row."""
        return self._table("stats")

    def stats_by_part(self, columns: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
        """Columns of `stats`, by default all, a part at a time: a run may be larger than memory."""
        for part in self.parts():
            yield _read_stats(self.path / f"stats-{part}.parquet", columns)

    def ids(self) -> list[str]:
        """Ids of the traced samples, in the order of the parts."""
        return list(self._positions)

    def scores(self, sample: str, names: Collection[str] = ()) -> Scores:
        """Scores of a sample's tokens by kind of row: those of `names`, by default all.

        Raises:
            UserError: the sample was not traced, or the run has no scores of that name.
        """
        part, index = self._positions.get(sample, ("", -1))
        if index < 0:
            raise UserError(f"sample '{sample}' is not in run {self.path}")
        path = self.path / f"scores-{part}.safetensors"
        try:
            with safe_open(path, framework="np") as file:
                keys = (key.split(".", 1) for key in file.keys())  # noqa: SIM118
                own = [name for part_index, name in keys if part_index == str(index)]
                missing = next((name for name in names if name not in own), None)
                if missing is None:
                    return {name: file.get_tensor(f"{index}.{name}") for name in names or own}
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from None
        hint = "; trace with per_head" if missing.endswith(HEADS) else ""
        raise UserError(
            f"run {self.path} has no scores '{missing}' of sample '{sample}', it has {', '.join(own)}{hint}"
        )

    @cached_property
    def hash(self) -> str:
        """Hash of settings and traced sample ids."""
        ids = sorted(self._positions)
        text = self.meta.settings_json() + json.dumps(ids)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _positions(self) -> dict[str, tuple[str, int]]:
        positions: dict[str, tuple[str, int]] = {}
        for part in self.parts():
            ids = _read_table(self.path / f"samples-{part}.parquet", ["sample"])["sample"]
            positions |= {str(sample): (part, i) for i, sample in enumerate(ids)}
        return positions

    def _table(self, kind: str) -> pd.DataFrame:
        read = _read_stats if kind == "stats" else _read_table
        parts = [read(self.path / f"{kind}-{part}.parquet") for part in self.parts()]
        if not parts:
            raise UserError(
                f"run {self.path} holds no finished sample yet; run the same 'avlprof trace' again"
            )
        return pd.concat(parts, ignore_index=True)


class RunWriter:
    """Adds samples to a run directory, a part at a time; resumes by sample id.

    A writer without `part_prefix` is alone. With it, processes share the directory: one may
    write under a prefix at a time, until `close` or its end, and all must be of one launch of
    `processes`. What a killed one left unfinished is removed.

    Raises:
        UserError: `path` is something else, holds a run of other settings, or is being written.
    """

    def __init__(self, path: Path, meta: RunMeta, part_prefix: str = "", processes: int = 1) -> None:
        self.path, self.meta, self._prefix = path, meta, part_prefix
        check_free(path, meta)
        self._lock = FolderLock(path, part_prefix, team=str(processes))
        for left in path.glob(".*.partial"):
            if re.search(rf"-{re.escape(part_prefix)}\d{{5,}}\.", left.name):
                left.unlink(missing_ok=True)
        settle_meta(path, meta, part_prefix)
        self._clear()

    def done(self) -> set[str]:
        """Ids of the samples in finished parts."""
        return set(RunDirectory(self.path)._positions)

    def add(self, sample: dict[str, Any], stats: list[dict[str, Any]], scores: Scores) -> None:
        """Take one traced sample; it is on disk after the next `flush`."""
        index = len(self._samples)
        self._samples.append(sample)
        self._stats.extend(stats)
        self._scores |= {f"{index}.{name}": np.ascontiguousarray(value) for name, value in scores.items()}

    @property
    def pending(self) -> int:
        """Samples taken and not yet on disk."""
        return len(self._samples)

    @property
    def pending_bytes(self) -> int:
        """Memory that their scores take."""
        return sum(values.nbytes for values in self._scores.values())

    def flush(self) -> None:
        """Write the samples in hand as one part; they stay in hand if the disk refuses."""
        if self._samples:
            with uninterrupted():
                self._flush()

    def _flush(self) -> None:
        part = f"{self._prefix}{self._next_part():05d}"
        with replacing(self.path / f"scores-{part}.safetensors") as partial:
            try:
                save_file(self._scores, str(partial))
            except SafetensorError as error:
                raise OSError(str(error)) from None
        for kind, rows in (("stats", self._stats), ("samples", self._samples)):
            with replacing(self.path / f"{kind}-{part}.parquet") as partial:
                pd.DataFrame(rows).to_parquet(partial, index=False)
        self._clear()

    def close(self) -> None:
        """Let another process write under this prefix; samples not flushed are dropped."""
        self._clear()
        self._lock.release()

    def _next_part(self) -> int:
        number = re.compile(rf"samples-{re.escape(self._prefix)}(\d{{5,}})\.parquet")
        matches = (number.fullmatch(path.name) for path in self.path.iterdir())
        return max((int(match[1]) + 1 for match in matches if match), default=0)

    def _clear(self) -> None:
        self._samples: list[dict[str, Any]] = []
        self._stats: list[dict[str, Any]] = []
        self._scores: Scores = {}


def _read_stats(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A part of `stats`; version 0.1.0 knew of no learned sinks, so what they drew counts as 0 there."""
    try:
        missing = LEARNED_SINK not in parquet.read_schema(path).names
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    table = _read_table(path, [name for name in columns if not (missing and name == LEARNED_SINK)])
    if missing and (LEARNED_SINK in columns or not columns):
        table[LEARNED_SINK] = 0.0
    return table[list(columns)] if columns else table


def _read_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, columns=list(columns) or None)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
