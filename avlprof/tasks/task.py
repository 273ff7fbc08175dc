"""A source of samples with the metric that judges the answers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from avlprof.errors import UserError, shortened
from avlprof.registry import unknown
from avlprof.tasks.sample import Sample
from avlprof.tasks.splits import ALL, HELD_OUT, SEARCH

MOST_DRAWN: Final = 100_000
"""Samples that may be asked of a task that draws them without end: a minute's work."""


@dataclass(frozen=True)
class Task:
    """Samples in named splits, and how to judge an answer to one.

    `stream(split)` yields the samples of a split, always the same ones in the same order, and
    may be endless; `default_samples` then says how many of them count as the split. `head(split,
    n)` is a cheaper way to at least the first n of them, where there is one. `metric` is a name
    for `load_metric`; `max_new_tokens` is the longest answer to generate.

    `provenance` says in words where the samples come from: dataset, config, split and revision, or
    file and digest. `counts` are the samples of every split, where they are known beforehand.
    """

    name: str
    metric: str
    splits: tuple[str, ...]
    stream: Callable[[str], Iterable[Sample]]
    max_new_tokens: int = 64
    default_samples: int | None = None
    head: Callable[[str, int], Iterable[Sample]] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def samples(self, split: str, n: int | None = None) -> list[Sample]:
        """The first `n` samples of a split (`None`: all of them, or `default_samples`).

        Sample i is the same whatever `n` is, so a longer run extends a shorter one. `UserError`
        when the split is unknown or empty, `n` is below 1, or above `MOST_DRAWN` where samples are
        drawn without end.
        """
        if split not in self.splits:
            raise unknown(f"split of task '{self.name}'", split, self.splits)
        if n is not None and n < 1:
            raise UserError(f"the number of samples must be at least 1, got {n}")
        if n is not None and n > MOST_DRAWN and self.default_samples is not None:
            raise UserError(
                f"the number of samples must be at most {MOST_DRAWN:,} in task '{self.name}', which has no "
                f"end, got {shortened(n)}"
            )
        most = self.default_samples if n is None else min(n, sys.maxsize)
        stream = self.stream(split) if n is None or self.head is None else self.head(split, n)
        samples = list(islice(stream, most))
        if not samples:
            others = ", ".join(s for s in self.splits if s != split)
            raise UserError(f"split '{split}' of task '{self.name}' is empty; try another split ({others})")
        return samples

    def sizes(self) -> dict[str, int]:
        """Number of samples of every split that is known without loading or drawing them."""
        sizes = dict(self.counts)
        if self.default_samples is not None:
            sizes = dict.fromkeys(self.splits, self.default_samples) | sizes
        return sizes

    def describe(self, split: str, n: int | None = None) -> str:
        """A sentence about what `samples(split, n)` leaves out or lacks; empty when it is all there.

        For the lines that a command prints before it starts: `task 'mine': split 'search' has 16
        of 30 samples (held-out 14); split all has every one`.
        """
        if split not in self.counts:
            return ""
        size, whole = self.counts[split], self.counts.get(ALL, 0)
        sentences = []
        if size < whole:
            others = ", ".join(f"{s} {c}" for s, c in self.counts.items() if s not in (split, ALL))
            by_hash = " by a hash of their ids" if split in (SEARCH, HELD_OUT) else ""
            sentences.append(
                f"split '{split}' has {size:,} of {whole:,} samples{by_hash} ({others}); "
                "split all has every one"
            )
        if n is not None and n > size:
            sentences.append(f"{n:,} samples asked for, {size:,} there")
        return f"task '{self.name}': {'; '.join(sentences)}" if sentences else ""

    def fingerprint(self) -> str:
        """16 hex digits that are equal where name, metric, splits and provenance are.

        It stands for the texts of the samples as far as the provenance does: the digest of a
        file, the revision of a dataset. Pictures beside a file are not looked at.
        """
        identity = [self.name, self.metric, list(self.splits), dict(sorted(self.provenance.items()))]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def chosen_types(task: str, types: str, known: Iterable[str]) -> tuple[str, ...]:
    """The question types of a task that a text names, separated by commas; all when it is empty.

    `UserError` when a type is unknown.
    """
    whole = tuple(known)
    chosen = tuple(dict.fromkeys(name.strip() for name in types.split(","))) if types.strip() else whole
    for name in chosen:
        if name not in whole:
            raise unknown(f"question type of task '{task}'", name, whole)
    return chosen
