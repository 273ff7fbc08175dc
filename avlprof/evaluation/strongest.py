"""Which of several policies is best on one split, so that it can be tested once on another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from avlprof.errors import UserError
from avlprof.evaluation.answers import generate_answers, prompt_lengths
from avlprof.evaluation.answers_store import AnswerStore
from avlprof.evaluation.contenders import seeded
from avlprof.models import LoadedModel
from avlprof.policy import Policy
from avlprof.tasks import Task


@dataclass(frozen=True)
class Strongest:
    """The policy with the highest mean score; `scores` holds every candidate's, in their order.

    Seeds of a random policy are averaged. On a tie the first candidate wins.
    """

    policy: Policy
    scores: tuple[tuple[str, float], ...]


def strongest(
    loaded: LoadedModel,
    task: Task,
    candidates: Sequence[Policy],
    *,
    split: str = "search",
    samples: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    store: AnswerStore | None = None,
    advanced: Callable[[int], None] | None = None,
) -> Strongest:
    """Generate with every candidate on a split and pick the best by the task's metric.

    The score of the winner on the same split flatters it, since it was picked for it; compare on
    another split.

    Args:
        candidates: policies at one budget; see `at_budget`.
        store: answers found there are not generated again.
        advanced: called with the number of answers that were just made or found.

    Raises:
        UserError: no candidate, or a policy does not fit the model.
    """
    if not candidates:
        raise UserError("the strongest of no policy was asked for; give at least one baseline")
    chosen = task.samples(split, samples)
    lengths = prompt_lengths(loaded, chosen) if batch_size > 1 else None
    means = []
    for policy in candidates:
        scores = []
        for run in seeded(policy):
            answers = generate_answers(
                loaded, chosen, run, max_new_tokens=max_new_tokens or task.max_new_tokens,
                batch_size=batch_size, metric=task.metric, lengths=lengths, store=store,
            )  # fmt: skip
            scores.append(np.mean([answer.score for answer in answers]))
            if advanced:
                advanced(len(chosen))
        means.append(float(np.mean(scores)))
    named = tuple((policy.name, mean) for policy, mean in zip(candidates, means, strict=True))
    return Strongest(candidates[int(np.argmax(means))], named)
