"""Average normalised Levenshtein similarity."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from avlprof.tasks.metrics._base import best

_THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Similarity to the nearest answer: 1 - edit distance / longer length, 0 when below 0.5.

    Case is ignored and runs of white space count as one space. Source: ST-VQA (Biten et al.
    2019, https://arxiv.org/abs/1905.13648) and DocVQA (Mathew et al. 2021,
    https://arxiv.org/abs/2007.00398). At a similarity of exactly 0.5 this follows the
    challenge's evaluation script, which keeps it; the paper's formula gives 0.
    """
    return best(prediction, answers, _similarity)


def _similarity(prediction: str, answer: str) -> float:
    a, b = (" ".join(text.lower().split()) for text in (prediction, answer))
    similarity = float(Levenshtein.normalized_similarity(a, b))
    return similarity if similarity >= _THRESHOLD else 0.0
