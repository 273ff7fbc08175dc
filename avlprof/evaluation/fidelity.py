"""How close policies stay to the dense model, on its own greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from avlprof.models import LoadedModel
from avlprof.policy import Policy
from avlprof.tasks import Sample

if TYPE_CHECKING:
    from avlprof.runtime.forced import ForcedScore


def fidelity(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policies: Sequence[Policy],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    advanced: Callable[[int], None] | None = None,
) -> list[list[ForcedScore]]:
    """Teacher-forced scores, `[policy][sample]`, in the order of the arguments.

    One batch of prompts is held at a time, so memory does not grow with the number of samples.

    Args:
        advanced: called with the number of (policy, sample) pairs that were just scored.
    """
    from avlprof.runtime.forced import ForcedSet

    found: list[list[ForcedScore]] = [[] for _ in policies]
    for start in range(0, len(samples) if policies else 0, batch_size):
        chunk = samples[start : start + batch_size]
        forced = ForcedSet.prepare(
            loaded,
            chunk,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            scorers=[policy.scorer for policy in policies],
        )
        for scores, more in zip(found, forced.score_many(policies), strict=True):
            scores.extend(more)
            if advanced:
                advanced(len(chunk))
    return found
