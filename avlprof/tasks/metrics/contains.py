"""Contains."""

from __future__ import annotations

from collections.abc import Sequence

from avlprof.tasks.metrics._base import best


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 when one of the answers occurs in the prediction, letter by letter, else 0.

    Case is ignored and runs of white space count as one space. There is no regard for word
    borders: `12` occurs in `312`. An empty answer occurs in an empty prediction alone.

    Source: OCRBench (Liu et al. 2023, https://arxiv.org/abs/2305.07895), all of its subsets but
    HME100k, which removes white space.
    """
    return best(prediction, answers, _occurs)


def _occurs(prediction: str, answer: str) -> float:
    text, wanted = (" ".join(t.lower().split()) for t in (prediction, answer))
    return float(wanted in text if wanted else not text)
