"""Policies scored by what they really answer: slow, and the task's own measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from avlprof.evaluation import Answer, AnswerStore, generate_answers
from avlprof.models import LoadedModel
from avlprof.policy import Policy
from avlprof.tasks import Sample, Task

BATCH = 32


class Generated:
    """Greedy answers to a list of samples, judged by a task's metric.

    Answers in `store` are not generated again.

    Args:
        lengths: prompt tokens by sample id; samples of like length share a batch.
        limit: the longest answer, in tokens.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: Task,
        samples: Sequence[Sample],
        limit: int,
        lengths: Mapping[str, int],
        store: AnswerStore,
    ) -> None:
        self._loaded, self._task, self._asked = loaded, task, samples
        self._limit, self._lengths, self._store = limit, lengths, store

    @property
    def samples(self) -> list[str]:
        """Ids, in the order of the scores."""
        return [sample.id for sample in self._asked]

    def parts(self, policy: Policy | None) -> Iterator[list[Answer]]:
        """Answers batch by batch, in the order of the samples; None is the dense model."""
        for start in range(0, len(self._asked), BATCH):
            yield generate_answers(
                self._loaded,
                self._asked[start : start + BATCH],
                policy,
                max_new_tokens=self._limit,
                batch_size=BATCH,
                metric=self._task.metric,
                lengths=self._lengths,
                store=self._store,
            )

    def metric(self, policy: Policy | None) -> NDArray[np.float64]:
        """The task's metric `[n]`, one number a sample."""
        return np.array([answer.score for part in self.parts(policy) for answer in part])
