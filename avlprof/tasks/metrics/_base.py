"""What a metric is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from avlprof.errors import UserError

Metric = Callable[[str, Sequence[str]], float]
"""`metric(prediction, answers)`: how well a prediction fits the reference answers, from 0 to 1.

A pure function; the order of the answers does not matter, an empty prediction is allowed, and
`UserError` is raised when there is no answer. `avlprof.testing.metrics` has its conformance test.
"""


def best(prediction: str, answers: Sequence[str], score: Callable[[str, str], float]) -> float:
    """The highest `score(prediction, answer)` over the answers; `UserError` when there are none."""
    return max(score(prediction, answer) for answer in required(answers))


def required(answers: Sequence[str]) -> Sequence[str]:
    """The answers, or `UserError` when there are none."""
    if not answers:
        raise UserError("a sample without reference answers cannot be scored; give it answers")
    return answers
