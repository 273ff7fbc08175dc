"""A source of samples with the metric that judges the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from avlprof.errors import UserError
from avlprof.registry import unknown
from avlprof.tasks.sample import Sample


@dataclass(frozen=True)
class Task:
    """Samples in named splits, and how to judge an answer to one.

    `stream(split)` yields the samples of a split, always the same ones in the same order, and
    may be endless; `default_samples` then says how many of them count as the split.
    `metric` is a name for `load_metric`; `max_new_tokens` is the longest answer to generate.
    """

    name: str
    metric: str
    splits: tuple[str, ...]
    stream: Callable[[str], Iterable[Sample]]
    max_new_tokens: int = 64
    default_samples: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def samples(self, split: str, n: int | None = None) -> list[Sample]:
        """The first `n` samples of a split (`None`: all of them, or `default_samples`).

        Sample i is the same whatever `n` is, so a longer run extends a shorter one. `UserError`
        when the split is unknown or empty, or `n` is below 1.
        """
        if split not in self.splits:
            raise unknown(f"split of task '{self.name}'", split, self.splits)
        if n is not None and n < 1:
            raise UserError(f"the number of samples must be at least 1, got {n}")
        found = list(islice(self.stream(split), self.default_samples if n is None else n))
        if not found:
            others = ", ".join(s for s in self.splits if s != split)
            raise UserError(f"split '{split}' of task '{self.name}' is empty; try another split ({others})")
        return found


def origin(task: Task) -> dict[str, str]:
    """Where the samples of a task come from, in words, as runs and studies note it."""
    known: Mapping[str, object] = getattr(task, "provenance", None) or {}
    return {str(name): str(value) for name, value in sorted(known.items())}
