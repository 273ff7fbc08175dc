"""From what a user types to a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from avlprof.errors import UserError
from avlprof.registry import Registry, unknown
from avlprof.tasks.metrics import load_metric
from avlprof.tasks.presets import load_preset, presets
from avlprof.tasks.task import Task

TaskFactory = Callable[[str], Task]
"""Makes a task from what follows the first `:` of its name, empty when nothing does."""

TASKS: Registry[TaskFactory] = Registry("task", {"shapes": "avlprof.tasks.shapes.task:shapes_task"})


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

    `spec` is a path that ends in `.jsonl`; `hf:NAME`; a registered task, with its own options
    behind a colon (`shapes:describe,read`); a preset of a well-known dataset (`textvqa`, or
    `textvqa:FOLDER` for a copy of it); the folder of a dataset; or `ORG/NAME` on the Hugging Face
    Hub. `metric` and `max_new_tokens` override what the task proposes. The other
    options belong to Hugging Face datasets: `columns` maps fields of a sample to columns
    (`prompt=question,answers=label`), `split` is the split to draw from, `config` and
    `revision` are those of the dataset.

    `UserError` names what is unknown or unreadable, and near names where there are any.
    """
    dataset_options = {"columns": columns, "split": split, "config": config, "revision": revision}
    overrides: dict[str, str | int] = {}
    if metric is not None:
        load_metric(metric)
        overrides["metric"] = metric
    if max_new_tokens is not None:
        overrides["max_new_tokens"] = max_new_tokens
    name, _, rest = spec.partition(":")
    if name in presets() and name not in TASKS.names():
        task = load_preset(name).task(
            str(Path(rest).expanduser()) if rest else None,
            columns=_column_map(columns),
            split=split,
            config=config,
            revision=revision,
        )
        return dataclasses.replace(task, **overrides)  # type: ignore[arg-type]
    dataset = _dataset_name(spec)
    if dataset is not None:
        from avlprof.tasks.huggingface import huggingface_task

        task = huggingface_task(dataset, columns=columns, split=split, config=config, revision=revision)
        return dataclasses.replace(task, **overrides)  # type: ignore[arg-type]
    given = [option for option, value in dataset_options.items() if value is not None]
    if given:
        raise UserError(f"{given[0]} is an option of Hugging Face datasets; task '{spec}' is not one")
    if spec.endswith(".jsonl"):
        from avlprof.tasks.jsonl import jsonl_task

        task = jsonl_task(Path(spec))
    else:
        task = TASKS.get(name)(rest)
    return dataclasses.replace(task, **overrides)  # type: ignore[arg-type]


def _column_map(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    if isinstance(columns, str):
        from avlprof.tasks.huggingface import parse_columns

        return parse_columns(columns)
    return dict(columns or {})


def _dataset_name(spec: str) -> str | None:
    """The folder or name on the Hub of a dataset; `None` when `spec` is something else."""
    if spec.startswith("hf:"):
        if spec == "hf:":
            raise UserError("task 'hf:' lacks the name of a dataset; write hf:NAME or hf:ORG/NAME")
        return spec.removeprefix("hf:")
    if spec.endswith(".jsonl") or spec.partition(":")[0] in TASKS.names():
        return None
    if Path(spec).expanduser().is_dir():
        return str(Path(spec).expanduser())
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UserError(f"task folder {spec} does not exist")
    if spec.count("/") == 1:
        return spec
    raise unknown("task", spec.partition(":")[0], [*TASKS.names(), *presets()])
