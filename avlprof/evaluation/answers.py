"""Greedy answers to samples, with their bytes; which samples are answered, and how."""

from __future__ import annotations

import datetime
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from avlprof.errors import UserError
from avlprof.evaluation.batches import EncodedBatches, answer_batches, prompt_lengths
from avlprof.evaluation.doubts import check_finite
from avlprof.evaluation.generating import answer_batch
from avlprof.evaluation.store import Answer, AnswerStore, Ask, model_key, policy_key
from avlprof.models import LoadedModel
from avlprof.policy import Policy
from avlprof.tasks import Metric, Sample, Task, load_metric
from avlprof.versions import versions
from avlprof.watch import SILENT, Watch


@dataclass(frozen=True)
class AnswerSettings:
    """How samples are answered and judged.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        batch_size: samples generated at a time.
        metric: what judges an answer (`avlprof.tasks`).
        lengths: prompt tokens by sample id, when known (`prompt_lengths`); they only order.
        said: tokens of answers by sample id, as far as known; they only order.
        encoded: batches that were encoded before.
    """

    max_new_tokens: int
    batch_size: int = 16
    metric: str = "exact_match"
    lengths: Mapping[str, int] | None = None
    said: Mapping[str, int] = field(default_factory=dict)
    encoded: EncodedBatches = field(default_factory=EncodedBatches, compare=False, repr=False)

    def knowing(self, said: Mapping[str, int]) -> AnswerSettings:
        """With the tokens of answers known: other samples come together, so encoded batches are let go."""
        return replace(self, said=said, encoded=EncodedBatches())


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Which samples are answered, and how: what an evaluation and a comparison have in common.

    Attributes:
        split: which split of the task.
        samples: how many of it, its first ones; None means what the task calls the split.
        max_new_tokens: the longest answer; None is the task's.
        batch_size: samples generated at a time.

    Raises:
        UserError: a number is below 1.
    """

    split: str = "held-out"
    samples: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more samples, got {self.batch_size}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")

    def answering(self, loaded: LoadedModel, task: Task, samples: Sequence[Sample]) -> AnswerSettings:
        """How these samples of a task are answered; batches need the lengths of their prompts."""
        lengths = prompt_lengths(loaded, samples) if self.batch_size > 1 else None
        limit = self.max_new_tokens or task.max_new_tokens
        return AnswerSettings(limit, self.batch_size, task.metric, lengths)

    def ask(
        self, policies: Sequence[Policy | None], samples: Sequence[Sample], answering: AnswerSettings
    ) -> Ask:
        """These samples of the split, to be answered under policies."""
        return Ask(tuple(policies), self.split, self.samples, samples, answering)

    def about(self, loaded: LoadedModel, task: Task, samples: int) -> dict[str, Any]:
        """Model, task, split, counts, versions and time: the part of `meta` that all results have.

        With the layers that shares are of, where policies leave others as they are.
        """
        own = loaded.adapter.governed
        return ({} if own is None else {"governed": list(own)}) | {
            "model": loaded.source,
            "revision": loaded.revision or "",
            "checkpoint": loaded.settings,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "task": task.name,
            "dataset": dict(task.provenance),
            "metric": task.metric,
            "split": self.split,
            "samples": samples,
            "max_new_tokens": self.max_new_tokens or task.max_new_tokens,
            "batch_size": self.batch_size,
            "versions": versions(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


FLUSH_SECONDS = 10.0


def generate_answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policy: Policy | None,
    settings: AnswerSettings,
    *,
    store: AnswerStore | None = None,
    watch: Watch = SILENT,
) -> list[Answer]:
    """A greedy answer to every sample, in their order; `answers_under` for one policy."""
    return answers_under(loaded, samples, [policy], settings, store=store, watch=watch)[0]


def answers_under(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policies: Sequence[Policy | None],
    settings: AnswerSettings,
    *,
    store: AnswerStore | None = None,
    watch: Watch = SILENT,
) -> list[list[Answer]]:
    """A greedy answer to every sample under each policy, `[policy][sample]`; None is the stock model.

    Samples of like prompt and answer length share a batch, padded on the left, and policies its prompt
    (see `avlprof.runtime.shared_prompt`). Answers in `store` are not
    generated again, and new ones are on disk every few seconds, so a second call resumes. What `pictures` of
    a policy says is done here; dense bytes are those of the pictures as they are.

    Bytes of a row: live, dense and allocated ones are read off the cache right after prefill (see
    `footprint`). Read bytes a step are `policy.read_share` at the row's own answer length, since a
    batch decodes on until its longest answer ends; the runtime's counters agree where a batch has
    one row.

    Args:
        settings: how long answers may be, how many are made at a time, and what judges them.
        watch: its phase `answers` counts answers, those in `store` included.

    Raises:
        UserError: a policy does not fit, a picture cannot be read or made smaller, or a sample has no
            answers.
    """
    judge, limit, model = load_metric(settings.metric), settings.max_new_tokens, model_key(loaded)
    asked = {policy_key(policy): policy for policy in policies}
    known = {
        name: store.answers(model, policy, samples, limit) if store else {} for name, policy in asked.items()
    }
    flushed = time.monotonic()

    def tell() -> None:
        watch.phase("answers", sum(len(known[policy_key(policy)]) for policy in policies), total)

    total = len(policies) * len(samples)
    tell()
    try:
        for some, lacking in lacking_alike(asked.values(), known.values(), samples):
            for batch in answer_batches(loaded, lacking, settings):
                for policy, answers in answer_batch(loaded, batch, some, settings):
                    for sample, answer in zip(batch, answers, strict=True):
                        known[policy_key(policy)][sample.id] = answer
                        if store:
                            store.add(model, sample, limit, answer)
                    tell()
                    if store and time.monotonic() - flushed > FLUSH_SECONDS:
                        store.flush()
                        flushed = time.monotonic()
    finally:
        if store:
            store.flush()
    return [_judged(known[policy_key(policy)], samples, judge, settings.metric) for policy in policies]


def lacking_alike(
    policies: Iterable[Policy | None], known: Iterable[Container[str]], samples: Sequence[Sample]
) -> list[tuple[list[Policy | None], list[Sample]]]:
    """Policies that lack answers to the same samples, and these; `known` has the ids that each does not."""
    found: dict[tuple[str, ...], tuple[list[Policy | None], list[Sample]]] = {}
    for policy, own in zip(policies, known, strict=True):
        todo = [sample for sample in samples if sample.id not in own]
        found.setdefault(tuple(sample.id for sample in todo), ([], todo))[0].append(policy)
    return [(some, todo) for some, todo in found.values() if todo]


def _judged(
    known: Mapping[str, Answer], samples: Sequence[Sample], judge: Metric, metric: str
) -> list[Answer]:
    """The answers with their scores, in the order of the samples."""
    scores = np.array([judge(known[sample.id].prediction, sample.answers) for sample in samples], float)
    check_finite(scores, metric, [sample.id for sample in samples])
    return [
        replace(known[sample.id], score=float(score)) for sample, score in zip(samples, scores, strict=True)
    ]
