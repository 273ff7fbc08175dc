"""Exact match."""

from __future__ import annotations

from collections.abc import Sequence

from avlprof.tasks.metrics._base import best

_ENDS = ".,;:!? \u3002\uff0e\uff0c\u3001\uff1b\uff1a\uff01\uff1f"


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction equals one of the answers after normalisation, else 0.

    Normalisation: case is folded, runs of white space become one space, and white space around
    the text and punctuation (`.,;:!?` and their Chinese forms) at its end go. Articles stay.
    Source: the exact match of SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250) with
    this lighter normalisation, which is this project's own.
    """
    return best(prediction, answers, lambda p, a: float(_normal(p) == _normal(a)))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(_ENDS)
