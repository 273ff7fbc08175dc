"""Tasks from Hugging Face datasets: by name on the Hub, or a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from avlprof.errors import UserError
from avlprof.registry import unknown
from avlprof.tasks.cells import Pictures, pictures_in, pictures_of, undecoded
from avlprof.tasks.dataset import Dataset, open_dataset
from avlprof.tasks.fields import EXAMPLE, FIELDS, answers_in, column_map, parse_columns
from avlprof.tasks.sample import Sample
from avlprof.tasks.splits import ALL, HELD_OUT, SEARCH, half_of
from avlprof.tasks.task import Task
from avlprof.tasks.text import quoted
from avlprof.tasks.turn import marked_turn
from avlprof.tasks.wording import Wording

__all__ = ["huggingface_task", "parse_columns"]

_REQUIRED = ("image", "prompt")
_PREFERRED_SPLITS = ("validation", "val", "dev", "test", "train")


@dataclass(frozen=True)
class _Table:
    """One split of a dataset: its rows, the columns that the fields are read from, and the wording.

    `renamed` says that repeated ids get the number of their row, as a stream cannot know whether
    ids repeat further down.
    """

    name: str
    rows: Any
    columns: Mapping[str, str]
    wording: Wording | None
    folder: Path | None
    streamed: bool
    renamed: bool


def huggingface_task(
    name: str,
    *,
    columns: str | Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    wording: Wording | None = None,
) -> Task:
    """The task of a dataset on the Hub, of a `save_to_disk` folder, or of a local dataset folder.

    Samples come from `split`, which may be sliced on the Hub (`validation[:500]`); without it
    from the first of validation, val, dev, test, train. They are halved by their ids, or by the
    column `picture` so that no picture is in both, into `search` and `held-out`; `all` is both;
    the dataset's own splits go by their own names, which win. Pictures are decoded when they are
    opened. `columns` may name some fields only; the rest is looked for under usual names, and rows
    without unique ids are named by split and number. `wording` makes prompts from several columns.

    The first n samples of a dataset on the Hub are streamed, so that the rest of the split is not
    downloaded. `provenance` of the task holds the dataset, its configuration and split, and the
    commit of the Hub or a fingerprint of the folder.

    `UserError` when the `datasets` package is missing, the Hub out of reach, or a dataset, split
    or column unknown.
    """
    named = column_map(columns)
    dataset = open_dataset(name, config, revision)
    chosen = split or next((s for s in _PREFERRED_SPLITS if s in dataset.splits), dataset.splits[0])
    if chosen.partition("[")[0] not in dataset.splits:
        raise unknown(f"split of dataset '{name}'", chosen, dataset.splits)
    halves = [s for s in (SEARCH, HELD_OUT, ALL) if s not in dataset.splits]
    splits = _Splits(dataset, chosen, frozenset(halves), named, wording)
    splits.check()
    return Task(
        name=Path(name).name,
        metric="exact_match",
        splits=(*halves, *dataset.splits),
        stream=splits.samples,
        head=splits.head,
        provenance=dataset.provenance(chosen, config, revision),
    )


class _Splits:
    """The splits of a task over a dataset: each table is opened when it is needed, and once."""

    def __init__(
        self,
        dataset: Dataset,
        chosen: str,
        halves: frozenset[str],
        named: Mapping[str, str],
        wording: Wording | None,
    ) -> None:
        self.dataset, self.chosen, self.halves = dataset, chosen, halves
        self.named, self.wording = named, wording
        self._whole: dict[str, _Table] = {}
        self._streams: dict[str, _Table | None] = {}

    def check(self) -> None:
        """Raises `UserError` for columns that do not fit, with as little loaded as it takes."""
        if self._stream(self.chosen) is None:
            self._table(self.chosen)

    def samples(self, split: str) -> Iterator[Sample]:
        """All samples of a split, which is loaded whole."""
        return _samples(self._table(self._own(split)), self._half(split))

    def head(self, split: str, n: int) -> Iterable[Sample]:
        """The first n samples, streamed where the dataset can be."""
        own = self._own(split)
        stream = None if own in self._whole else self._stream(own)
        if stream is not None:
            try:
                return list(islice(_samples(stream, self._half(split)), n))
            except UserError:
                raise
            except Exception:  # streams break in as many ways as there are file systems: load it whole
                self._streams[own] = None
        return self.samples(split)

    def _own(self, split: str) -> str:
        return self.chosen if split in self.halves else split

    def _half(self, split: str) -> str | None:
        return split if split in self.halves and split != ALL else None

    def _table(self, own: str) -> _Table:
        if own not in self._whole:
            rows = self.dataset.load(own)
            self._whole[own] = _table(own, rows, self.named, self.dataset, self.wording)
        return self._whole[own]

    def _stream(self, own: str) -> _Table | None:
        if own not in self._streams:
            rows = self.dataset.rows_of_stream(own)
            self._streams[own] = (
                None if rows is None else _table(own, rows, self.named, self.dataset, self.wording)
            )
        return self._streams[own]


def _samples(table: _Table, half: str | None) -> Iterator[Sample]:
    columns = table.columns
    seen: set[str] = set()
    for index, row, pictures in _rows(table):
        where = f"row {index} of split '{table.name}'"
        name = str(_cell(row, columns["id"])) if "id" in columns else f"{table.name}-{index:05d}"
        if table.renamed and name in seen:
            name = f"{name}-{index:05d}"
        seen.add(name)
        key = str(_cell(row, columns["picture"])) if "picture" in columns else name
        if half is not None and half_of(key) != half:
            continue
        prompt, answer = _question(table, row, where)
        turn = marked_turn("user", prompt, pictures(), (), f"{where}: prompt")
        yield Sample(
            id=name,
            images=turn.images,
            prompt=turn.text,
            answers=answers_in(answer),
            group=str(_cell(row, columns["group"])) if "group" in columns else "",
            offsets=turn.offsets,
        )


def _rows(table: _Table) -> Iterator[tuple[int, dict[str, Any], Callable[[], Pictures]]]:
    """Number and texts of every row, and what makes functions that decode its pictures."""
    column, wording = table.columns["image"], table.wording
    wanted = {name for field, name in table.columns.items() if field != "image"}
    wanted |= wording.columns() if wording else set()
    features = table.rows.features
    where = f"row {{}} of split '{table.name}', column '{column}'"
    if table.streamed:
        feature = features[column]
        for index, row in enumerate(table.rows.cast_column(column, undecoded(feature))):
            yield index, row, partial(pictures_of, row[column], feature, where.format(index))
        return
    held = {name if name in features else name.partition(".")[0] for name in wanted}
    texts = table.rows.select_columns(sorted(held))
    pictures = table.rows.select_columns([column])
    for index, row in enumerate(texts):
        yield index, row, partial(pictures_in, pictures, index, column, where.format(index), table.folder)


def _question(table: _Table, row: Mapping[str, Any], where: str) -> tuple[str, object]:
    """The prompt of a row and the cell of its answers."""
    columns, wording = table.columns, table.wording
    answer = _cell(row, columns["answers"]) if "answers" in columns else None
    class_name = getattr(table.rows.features.get(columns.get("answers")), "int2str", None)
    if wording is not None:
        try:
            prompt, answer = wording.prompt(row), wording.answer(answer, row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    else:
        prompt = _cell(row, columns["prompt"])
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: column '{columns['prompt']}' must hold a prompt, got {quoted(prompt)}")
    if class_name is not None and answer is not None and not isinstance(answer, str):
        answer = class_name(answer)
    return prompt, answer


def _cell(row: Mapping[str, Any], column: str) -> Any:
    """A cell by its column, or by a column of records and a field in it (`json.question`)."""
    if column in row:
        return row[column]
    record, _, field = column.partition(".")
    inner = row.get(record)
    return inner.get(field) if isinstance(inner, dict) else None


def _table(own: str, rows: Any, named: Mapping[str, str], source: Dataset, wording: Wording | None) -> _Table:
    split, streamed = own.partition("[")[0], not hasattr(rows, "num_rows")
    columns = _columns(rows, named, source.name, wording)
    if not streamed and rows.num_rows == 0:
        raise UserError(f"split '{split}' of dataset '{source.name}' has no rows; give another split")
    renamed = source.stream is not None and "id" in columns and "id" not in named
    if "id" in columns and not renamed and not streamed and not _unique(rows, columns["id"]):
        if "id" in named:
            raise UserError(
                f"column '{named['id']}' (for id) of dataset '{source.name}' must not repeat a value"
            )
        del columns["id"]
    return _Table(split, rows, columns, wording, source.folder, streamed, renamed)


def _columns(rows: Any, named: Mapping[str, str], dataset: str, wording: Wording | None) -> dict[str, str]:
    """Field of a sample -> column: those that the user names, and the usual ones for the rest."""
    held = _column_names(rows)
    for column in sorted(wording.columns()) if wording else ():
        if column not in held:
            raise unknown(f"column (of the prompt) of dataset '{dataset}'", column, held)
    for field, column in named.items():
        if column not in held:
            raise unknown(f"column (for {field}) of dataset '{dataset}'", column, held)
    columns = dict(named)
    for field, names in FIELDS.items():
        candidates = (c for name in names for c in (name, f"json.{name}") if c in held)
        usual = next((c for c in candidates if field != "image" or c in rows.features), None)
        if field not in columns and usual is not None:
            columns[field] = usual
    for field in _REQUIRED if wording is None else ("image",):
        if field not in columns:
            raise UserError(
                f"dataset '{dataset}' has no column for {field} among {', '.join(held)}; "
                f"give columns, such as {EXAMPLE}"
            )
    return columns


def _column_names(rows: Any) -> list[str]:
    """Columns, and the fields of those that hold records of WebDataset (`json.question`)."""
    names = list(rows.features)
    inner = rows.features.get("json")
    return names + [f"json.{field}" for field in inner] if isinstance(inner, dict) else names


def _unique(rows: Any, column: str) -> bool:
    held = column if column in rows.features else column.partition(".")[0]
    names = [str(_cell({held: value}, column)) for value in rows[held]]
    return len(set(names)) == len(names)
