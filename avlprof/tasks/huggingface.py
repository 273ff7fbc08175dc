"""Tasks from Hugging Face datasets: by name on the Hub, or a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from avlprof.errors import UserError
from avlprof.registry import unknown
from avlprof.tasks.cells import answers_in, pictures_in
from avlprof.tasks.sample import Sample
from avlprof.tasks.splits import ALL, HELD_OUT, SEARCH, half_of
from avlprof.tasks.task import Task
from avlprof.tasks.wording import Wording

# For every field of a sample: the columns that are taken for it when the user names none.
_USUAL_COLUMNS = {
    "image": ("image", "images"),
    "prompt": ("prompt", "question", "query"),
    "answers": ("answers", "answer", "label"),
    "id": ("id", "question_id", "questionId", "sample_id"),
    "group": (),
    "picture": (),
}
_REQUIRED = ("image", "prompt")
_PREFERRED_SPLITS = ("validation", "val", "dev", "test", "train")
_EXAMPLE = "image=picture,prompt=question,answers=labels"


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
        if field not in _USUAL_COLUMNS:
            raise unknown("field of columns", field, _USUAL_COLUMNS)
        if field in columns:
            raise UserError(f"columns names field '{field}' twice in '{text}'")
        columns[field] = column
    return columns


@dataclass(frozen=True)
class _Table:
    """One split of a dataset, its name, the columns that the fields are read from, and the wording."""

    name: str
    rows: Any
    columns: Mapping[str, str]
    wording: Wording | None


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

    `UserError` when the `datasets` package is missing, the Hub out of reach, or a dataset, split
    or column unknown.
    """
    given = parse_columns(columns) if isinstance(columns, str) else dict(columns or {})
    names, load = _saved(name) if _is_saved(Path(name)) else _loadable(name, config, revision)
    chosen = split or next((s for s in _PREFERRED_SPLITS if s in names), names[0])
    if chosen.partition("[")[0] not in names:
        raise unknown(f"split of dataset '{name}'", chosen, names)

    @cache
    def table(own: str) -> _Table:
        return _table(own.partition("[")[0], load(own), given, name, wording)

    table(chosen)
    halves = [s for s in (SEARCH, HELD_OUT, ALL) if s not in names]
    return Task(
        name=Path(name).name,
        metric="exact_match",
        splits=(*halves, *names),
        stream=lambda wanted: _stream(
            table(chosen if wanted in halves else wanted),
            half=wanted if wanted in halves and wanted != ALL else None,
        ),
    )


def _stream(table: _Table, half: str | None) -> Iterator[Sample]:
    columns, wording = table.columns, table.wording
    wanted = {column for field, column in columns.items() if field != "image"}
    texts = table.rows.select_columns(sorted(wanted | (wording.columns() if wording else set())))
    class_name = getattr(table.rows.features.get(columns.get("answers")), "int2str", None)
    pictures = table.rows.select_columns([columns["image"]])
    for index, row in enumerate(texts):
        name = str(row[columns["id"]]) if "id" in columns else f"{table.name}-{index:05d}"
        if (
            half is not None
            and half_of(str(row[columns["picture"]]) if "picture" in columns else name) != half
        ):
            continue
        where = f"row {index} of split '{table.name}'"
        answer = row[columns["answers"]] if "answers" in columns else None
        if wording is None:
            prompt = row[columns["prompt"]]
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{where}: column '{columns['prompt']}' must hold a prompt, got {prompt!r}")
        else:
            try:
                prompt, answer = wording.prompt(row), wording.answer(answer, row)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        yield Sample(
            id=name,
            images=pictures_in(pictures, index, columns["image"], f"{where}, column '{columns['image']}'"),
            prompt=prompt,
            answers=answers_in(_answer(answer, class_name)),
            group=str(row[columns["group"]]) if "group" in columns else "",
        )


def _answer(cell: object, class_name: Callable[[object], str] | None) -> object:
    return cell if class_name is None or cell is None or isinstance(cell, str) else class_name(cell)


def _table(split: str, rows: Any, given: Mapping[str, str], dataset: str, wording: Wording | None) -> _Table:
    held = rows.column_names
    for column in sorted(wording.columns()) if wording else ():
        if column not in held:
            raise unknown(f"column (of the prompt) of dataset '{dataset}'", column, held)
    for field, column in given.items():
        if field not in _USUAL_COLUMNS:
            raise unknown("field of columns", field, _USUAL_COLUMNS)
        if column not in held:
            raise unknown(f"column (for {field}) of dataset '{dataset}'", column, held)
    columns = dict(given)
    for field, usual in _USUAL_COLUMNS.items():
        found = next((c for c in usual if c in held), None)
        if field not in columns and found is not None:
            columns[field] = found
    for field in _REQUIRED if wording is None else ("image",):
        if field not in columns:
            raise UserError(
                f"dataset '{dataset}' has no column for {field} among {', '.join(held)}; "
                f"give columns, such as {_EXAMPLE}"
            )
    if "id" in columns and not _unique(rows, columns["id"]):
        if "id" in given:
            raise UserError(f"column '{given['id']}' (for id) of dataset '{dataset}' must not repeat a value")
        del columns["id"]
    return _Table(split, rows, columns, wording)


def _unique(rows: Any, column: str) -> bool:
    ids = [str(value) for value in rows[column]]
    return len(set(ids)) == len(ids)


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved(folder: str) -> tuple[list[str], Callable[[str], Any]]:
    """Names of the splits that `save_to_disk` wrote, and how to get one."""
    datasets = _datasets()
    with _explained(folder, datasets):
        found = datasets.load_from_disk(folder)
    if isinstance(found, datasets.DatasetDict):
        return list(found), lambda split: found[split]
    name = str(found.split) if found.split is not None else ALL
    return [name], lambda split: found


def _loadable(name: str, config: str | None, revision: str | None) -> tuple[list[str], Callable[[str], Any]]:
    """Names of the splits of a dataset that `load_dataset` knows, and how to load one."""
    datasets = _datasets()

    def load(split: str) -> Any:
        with _explained(name, datasets):
            return datasets.load_dataset(name, config, split=split, revision=revision)

    with _explained(name, datasets):
        return list(datasets.get_dataset_split_names(name, config, revision=revision)), load


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(
            'Hugging Face datasets need a package more: pip install "avlprof[datasets]"'
        ) from None
    module: ModuleType = datasets
    return module


@contextmanager
def _explained(name: str, datasets: ModuleType) -> Iterator[None]:
    """Turns what `datasets` raises into one sentence."""
    try:
        yield
    except ConnectionError:
        raise UserError(
            f"dataset '{name}' is not in the local cache and the Hugging Face Hub cannot be reached; "
            "use a local folder or .jsonl file, or the task shapes"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"dataset '{name}' cannot be loaded: {reason[:300]}") from None
