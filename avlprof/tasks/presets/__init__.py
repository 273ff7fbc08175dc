"""Ready column maps for well-known Hugging Face datasets, as data files beside this module."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from avlprof.errors import UserError
from avlprof.registry import unknown
from avlprof.tasks.task import Task
from avlprof.tasks.wording import Wording

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """Where a dataset lies, what its columns mean, how it is asked and judged.

    `columns` maps fields of a sample to columns, `prompt` is a template with places for columns,
    `choices` the column with the options of multiple choice. `checked` says in words how far the
    preset was tried: none was run on the hub's own data.
    """

    name: str
    about: str
    source: str
    dataset: str
    split: str
    prompt: str
    metric: str
    max_new_tokens: int
    checked: str
    config: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    choices: str | None = None

    def task(
        self,
        dataset: str | None = None,
        *,
        columns: dict[str, str] | None = None,
        split: str | None = None,
        config: str | None = None,
        revision: str | None = None,
    ) -> Task:
        """The task, from the preset's dataset or from another with the same columns.

        Args:
            dataset: a folder or a name on the hub, in place of the preset's.
            columns: replaces single columns of the map.
            split, config: in place of the preset's; a folder is not asked for the preset's
                configuration.
        """
        from avlprof.tasks.huggingface import huggingface_task

        task = huggingface_task(
            dataset or self.dataset,
            columns=self.columns | (columns or {}),
            split=split or self.split,
            config=config or (None if dataset and Path(dataset).is_dir() else self.config),
            revision=revision,
            wording=Wording(self.prompt, self.choices),
        )
        return replace(task, name=self.name, metric=self.metric, max_new_tokens=self.max_new_tokens)


def presets() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """The preset of a name; `UserError` with the nearest names when there is none."""
    path = FOLDER / f"{name}.yaml"
    if name not in presets():
        raise unknown("preset", name, presets())
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {item.name for item in fields(Preset)} - {"name"}
    for key in data:
        if key not in known:
            raise UserError(f"unknown key '{key}' of preset {path}; known: {', '.join(sorted(known))}")
    return Preset(name=name, **data)
