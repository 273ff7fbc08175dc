"""Answers, and finished ones on disk, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from avlprof.errors import UserError
from avlprof.files import replacing
from avlprof.locks import uninterrupted
from avlprof.models import LoadedModel
from avlprof.policy import Policy
from avlprof.tasks import Sample
from avlprof.watch import SILENT, Watch

if TYPE_CHECKING:
    from avlprof.evaluation.answers import AnswerSettings

STOCK = "stock"
"""Stands for a policy's hash where the model ran without one."""


def policy_key(policy: Policy | None) -> str:
    """What answers under a policy are known by: what it does."""
    return policy.hash if policy else STOCK


@dataclass(frozen=True)
class Answer:
    """One greedy answer and its cost.

    `score` is the metric's, 0 to 1. `generated_tokens` counts up to and including the end token;
    `system`, `vision` and `text` are the prompt's tokens. Bytes are of the prompt's KV: `live` kept
    after prefill, `dense` what the stock cache holds of it, `allocated` the storage behind it,
    and `read_bytes_per_step` the mean attended to per decoding step.
    """

    sample: str
    group: str
    prediction: str
    score: float
    generated_tokens: int
    system: int
    vision: int
    text: int
    live_bytes: int
    dense_bytes: int
    allocated_bytes: int
    read_bytes_per_step: float
    policy_hash: str


_STORED = tuple(field.name for field in fields(Answer) if field.name != "score")
_KEY = ("model", "policy_hash", "sample", "asked", "max_new_tokens")
_Key = tuple[str, str, str, str, int]


class AnswerStore:
    """A folder of parquet parts, each written whole; many processes may add to one folder.

    An answer is found again for the same checkpoint, its settings (`avlprof.models.identity`) and
    precision, the same effect of the policy
    (its hash), the same sample id and prompt, and the same limit on tokens. Batch size and device
    do not count, though they move sums by rounding. Scores are not stored: they follow from the
    prediction, so another metric needs no new answers. Pictures are known by their sample's id
    only; use a new folder after changing one.

    Args:
        path: the folder.
        read: find what is there; without, answers are only added.
    """

    def __init__(self, path: Path | str, read: bool = True) -> None:
        self.path = Path(path)
        self._known: dict[_Key, Answer] = {}
        self._pending: list[dict[str, Any]] = []
        self._parts: set[str] = set()
        if read:
            self.read_new()

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left open."""

    def read_new(self) -> None:
        """Find what other processes have added."""
        for part in _parts(self.path):
            if part.name not in self._parts:
                self._read(part)
                self._parts.add(part.name)

    def share(self, loaded: LoadedModel, asks: Callable[[], Iterable[Ask]], watch: Watch = SILENT) -> None:
        """Have others help to answer what is not there, where a store has others (`SharedStore`).

        Args:
            asks: gives what will be asked for next, in the order in which it will be.
            watch: its phase `answers` counts what was not there.
        """

    def answers(
        self, model: str, policy: Policy | None, samples: Sequence[Sample], max_new_tokens: int
    ) -> dict[str, Answer]:
        """Finished answers to `samples` by id; their score is NaN."""
        does = policy_key(policy)
        keys = {
            sample.id: (model, does, sample.id, _prompt_hash(sample), max_new_tokens) for sample in samples
        }
        return {name: self._known[key] for name, key in keys.items() if key in self._known}

    def add(self, model: str, sample: Sample, max_new_tokens: int, answer: Answer) -> None:
        """Take an answer; it is on disk after the next `flush`."""
        prompt = _prompt_hash(sample)
        self._known[(model, answer.policy_hash, sample.id, prompt, max_new_tokens)] = answer
        row = {name: value for name, value in asdict(answer).items() if name in _STORED}
        self._pending.append(row | {"model": model, "asked": prompt, "max_new_tokens": max_new_tokens})

    def flush(self) -> None:
        """Write the answers in hand as one part."""
        with uninterrupted():
            _write(self.path, self._pending)
            self._pending = []

    def _read(self, part: Path) -> None:
        for row in _rows(part, [*_STORED, *_KEY]):
            answer = Answer(**{name: row[name] for name in _STORED}, score=float("nan"))
            model, does, sample, prompt, limit = (row[name] for name in _KEY)
            self._known[(str(model), str(does), str(sample), str(prompt), int(limit))] = answer


@dataclass(frozen=True)
class Loss:
    """What one sample's dense answer loses under a cut; fields as in `ForcedScore`.

    `prediction` is what the model says without the route, None where that was not asked for.
    """

    kl: float
    agreement: float
    log_likelihood: float
    tokens: int
    prediction: str | None


_LOSS = tuple(field.name for field in fields(Loss))
_LOSS_KEY = ("model", "sample", "asked", "max_new_tokens", "cut")


class LossStore:
    """Losses under cuts, kept as an `AnswerStore` keeps answers; a cut is known by its name.

    Without a path they are kept in memory alone.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._known: dict[tuple[Any, ...], Loss] = {}
        self._pending: list[dict[str, Any]] = []
        for part in _parts(self.path) if self.path is not None else []:
            for row in _rows(part, [*_LOSS, *_LOSS_KEY]):
                said = row["prediction"]
                loss = Loss(**{name: row[name] for name in _LOSS if name != "prediction"}, prediction=None)
                key = tuple(row[name] for name in _LOSS_KEY)
                self._known[key] = replace(loss, prediction=said) if isinstance(said, str) else loss

    def find(self, model: str, sample: Sample, max_new_tokens: int, cut: str) -> Loss | None:
        """The loss of a sample under the cut of this name, if it was measured."""
        return self._known.get((model, sample.id, _prompt_hash(sample), max_new_tokens, cut))

    def add(self, model: str, sample: Sample, max_new_tokens: int, cut: str, loss: Loss) -> None:
        """Take a loss; it is on disk after the next `flush`."""
        key = (model, sample.id, _prompt_hash(sample), max_new_tokens, cut)
        self._known[key] = loss
        self._pending.append(dict(zip(_LOSS_KEY, key, strict=True)) | asdict(loss))

    def flush(self) -> None:
        """Write the losses in hand as one part."""
        with uninterrupted():
            if self.path is not None:
                _write(self.path, self._pending)
            self._pending = []


@dataclass(frozen=True)
class Ask:
    """Samples that are to be answered under policies (None: dense).

    They are of the first `count` samples of a split of the task (None: as many as the task says).
    """

    policies: tuple[Policy | None, ...]
    split: str
    count: int | None
    samples: Sequence[Sample]
    settings: AnswerSettings

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return len(self.policies) * len(self.samples)


def share_out(
    store: AnswerStore | None, loaded: LoadedModel, asks: Callable[[], Iterable[Ask]], watch: Watch
) -> None:
    """Have others help with what is asked for next, where the store has others (`AnswerStore.share`)."""
    if store is not None:
        store.share(loaded, asks, watch)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _rows(part: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a part; `UserError` where it cannot be read. What is missing is None."""
    try:
        table = pd.read_parquet(part, columns=list(dict.fromkeys(columns)))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{part} cannot be read ({reason}); delete it and run again") from None
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as one more part of a folder, whole or not at all."""
    if rows:
        with replacing(folder / f"part-{uuid.uuid4().hex}.parquet") as partial:
            pd.DataFrame(rows).to_parquet(partial, index=False)


def model_key(loaded: LoadedModel) -> str:
    """Which checkpoint an answer is of, under which settings of it, and in which precision."""
    precision = str(loaded.model.dtype).removeprefix("torch.")
    return f"{loaded.source}@{loaded.revision or 'unknown'}:{precision}:{loaded.settings_hash}"


def _prompt_hash(sample: Sample) -> str:
    return hashlib.sha256(sample.asked.encode()).hexdigest()[:16]
