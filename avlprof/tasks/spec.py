"""Which task, and how to read it: what travels together from a command line to a worker."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avlprof.tasks.task import Task


@dataclass(frozen=True)
class TaskSpec:
    """Which task, and how to read it; see `avlprof.tasks.load_task`.

    Attributes:
        name: task, preset, file, folder or dataset.
        metric, max_new_tokens: in place of what the task proposes.
        columns: fields of a sample and their columns in a dataset, as `prompt=question,answers=label`.
        dataset_split, dataset_config, dataset_revision: which part and state of a dataset.
    """

    name: str = "shapes"
    metric: str | None = None
    max_new_tokens: int | None = None
    columns: str | None = None
    dataset_split: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None

    def load(self) -> Task:
        """The task; `UserError` when it is not known or cannot be read."""
        from avlprof.tasks.load import load_task

        return load_task(
            self.name,
            metric=self.metric,
            max_new_tokens=self.max_new_tokens,
            columns=self.columns,
            split=self.dataset_split,
            config=self.dataset_config,
            revision=self.dataset_revision,
        )

    def words(self) -> list[str]:
        """The command-line options that name this task to another process; defaults are left out."""
        words = ["--task", self.name]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return words
