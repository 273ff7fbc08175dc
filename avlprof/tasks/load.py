"""From what a user types to a task."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from avlprof.errors import UserError
from avlprof.registry import Registry, unknown
from avlprof.tasks.fields import column_map
from avlprof.tasks.file import file_task, holds_archives
from avlprof.tasks.metrics import load_metric
from avlprof.tasks.presets import load_preset, presets
from avlprof.tasks.rows import readable
from avlprof.tasks.source import local_path
from avlprof.tasks.task import Task
from avlprof.tasks.text import printable, shorten

TaskFactory = Callable[[str], Task]
"""Makes a task from what follows the first `:` of its name, empty when nothing does."""

TASKS: Registry[TaskFactory] = Registry(
    "task",
    {
        "shapes": "avlprof.tasks.shapes.task:shapes_task",
        "shapes-sizes": "avlprof.tasks.shapes.task:sizes_task",
        "pages": "avlprof.tasks.pages.task:pages_task",
    },
)

_PAGE = re.compile(r"^(?:hf:)?https?:/+huggingface\.co/datasets/([\w.-]+(?:/[\w.-]+)?)/?$")
_LONGEST_NAME = 200  # the Hub allows 96 characters and a name of an organisation before them


def load_task(
    spec: str,
    *,
    metric: str | None = None,
    max_new_tokens: int | None = None,
    columns: str | Mapping[str, str] | None = None,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Task:
    """The task that `spec` names.

    `spec` is a file of samples (`.jsonl`, `.json`, `.tsv`, `.csv`, `.parquet`, `.tar`); `hf:NAME`;
    a registered task, with its own options behind a colon (`shapes:describe,read`); a preset of a
    well-known dataset (`textvqa`, or `textvqa:FOLDER` for a copy of it); the folder of a dataset;
    or `ORG/NAME` on the Hugging Face Hub. `metric` and `max_new_tokens` override what the task
    proposes. `columns` maps fields of a sample to fields of a file or columns of a dataset
    (`prompt=question,answers=label`). The other options belong to Hugging Face datasets: `split` is
    the split to draw from, `config` and `revision` are those of the dataset.

    `UserError` names what is unknown or unreadable, and near names where there are any.
    """
    overrides: dict[str, str | int] = {}
    if metric is not None:
        load_metric(metric)
        overrides["metric"] = metric
    if max_new_tokens is not None:
        overrides["max_new_tokens"] = max_new_tokens
    options = {"split": split, "config": config, "revision": revision}
    task = _task(spec, columns, options)
    return dataclasses.replace(task, **overrides)  # type: ignore[arg-type]


def _task(spec: str, columns: str | Mapping[str, str] | None, options: dict[str, str | None]) -> Task:
    page = _PAGE.search(spec)
    if page is not None or not spec.strip():
        remedy = f"hf:{page.group(1)}" if page else "a name such as shapes, a file or a folder"
        raise UserError(
            f"task '{shorten(spec, 200)}' is {'a page of the Hub' if page else 'empty'}; give {remedy}"
        )
    name, _, rest = spec.partition(":")
    split, config, revision = options["split"], options["config"], options["revision"]
    if name in presets() and name not in TASKS.names():
        copy = str(local_path(rest, "task")) if rest else None
        return load_preset(name).task(
            copy, columns=column_map(columns), split=split, config=config, revision=revision
        )
    path = None if name in (*TASKS.names(), "hf") else local_path(spec, "task")
    if path is not None and (_is_file(path) or holds_archives(str(path))):
        _refuse(spec, options)
        return file_task(path, column_map(columns))
    dataset = _dataset_name(spec, path)
    if dataset is not None:
        from avlprof.tasks.huggingface import huggingface_task

        return huggingface_task(dataset, columns=columns, split=split, config=config, revision=revision)
    _refuse(spec, {"columns": columns, **options})
    return TASKS.get(name)(rest)


def _refuse(spec: str, options: Mapping[str, object]) -> None:
    option = next((option for option, value in options.items() if value is not None), None)
    if option is not None:
        raise UserError(f"{option} is an option of Hugging Face datasets; task '{shorten(spec)}' is not one")


def _is_file(path: Path) -> bool:
    """Whether a path is a file, or its ending says that one is meant."""
    return os.path.isfile(path) or (readable(path) and not os.path.isdir(path))


def _dataset_name(spec: str, path: Path | None) -> str | None:
    """The folder or name on the Hub of a dataset; `None` when `spec` is something else."""
    short = printable(shorten(spec, 200))
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:").removeprefix("//datasets/")
        if not name:
            raise UserError("task 'hf:' lacks the name of a dataset; write hf:NAME or hf:ORG/NAME")
        return name
    if path is None:
        return None
    if os.path.isdir(path):
        return str(path)
    if spec.startswith((".", "/", "~", "file:")) or spec.count("/") > 1:
        raise UserError(f"task folder {short} does not exist")
    if spec.count("/") == 1 and len(spec) <= _LONGEST_NAME:
        return spec
    raise unknown("task", shorten(printable(spec.partition(":")[0])), [*TASKS.names(), *presets()])
