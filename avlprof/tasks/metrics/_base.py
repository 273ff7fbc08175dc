"""What a metric is."""

from __future__ import annotations

import re
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


# Scripts that are written without spaces: Thai to Khmer, kana, ideographs. Korean has spaces.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f])"
)


def spaced(text: str) -> str:
    """The text with spaces around every character of scripts that are written without spaces.

    So a word is a character there, as in the evaluation of MLQA (`mixed_segmentation` in
    https://github.com/facebookresearch/MLQA) and of CMRC 2018 (https://arxiv.org/abs/1810.07366),
    which do so for Chinese. Here it holds for Japanese, Thai, Lao, Burmese and Khmer too.
    """
    return _UNSPACED.sub(r" \1 ", text)
