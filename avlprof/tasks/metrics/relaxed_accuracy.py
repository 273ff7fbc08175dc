"""Relaxed accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

from avlprof.tasks.metrics._base import best

_TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is a number within 5% of an answer, or the same text, else 0.

    `7%` is the number 0.07, so it matches `0.07` and not `7`. Where one of both is no number, or
    the answer is 0, the texts must be equal up to case and surrounding white space. Thousands
    separators and units make a text, not a number.

    Source: ChartQA (Masry et al. 2022, https://arxiv.org/abs/2203.10244, section 5.1) after
    PlotQA (Methani et al. 2020); the details are those of `relaxed_correctness` in Pix2Struct
    (https://github.com/google-research/pix2struct), the one that is commonly reported.
    """
    return best(prediction, answers, _correct)


def _correct(prediction: str, answer: str) -> float:
    prediction, answer = prediction.strip(), answer.strip()
    number, reference = _number(prediction), _number(answer)
    if number is None or not reference:
        return float(prediction.lower() == answer.lower())
    return float(abs(number - reference) / abs(reference) <= _TOLERANCE)


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
