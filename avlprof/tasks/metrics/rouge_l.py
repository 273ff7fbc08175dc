"""ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

from avlprof.tasks.metrics._base import best, spaced

_WORD = re.compile(r"\w+")


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words with the nearest answer.

    Words are runs of letters, digits and underscores, lower-cased; their order counts, gaps do
    not; in scripts without spaces (Chinese, Japanese, Thai, ...) every character is a word, as in
    `token_f1`. Precision and recall are the length of the subsequence over the words of prediction and
    answer. Where one of them has no word, the score is 1 if neither has, else 0. For captions;
    CIDEr is not offered, since it weighs words by a corpus and is no number of one sample.

    Source: ROUGE (Lin 2004, https://aclanthology.org/W04-1013/), sentence level with beta = 1. The
    caption tools of COCO (https://github.com/tylin/coco-caption) differ: beta = 1.2, and the best
    precision and the best recall may come from two answers.
    """
    return best(prediction, answers, _f1)


def _f1(prediction: str, answer: str) -> float:
    words, reference = (_WORD.findall(spaced(text.lower())) for text in (prediction, answer))
    if not words or not reference:
        return float(words == reference)
    return 2 * _common(words, reference) / (len(words) + len(reference))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for index, other in enumerate(b, start=1):
            above = row[index]
            row[index] = before + 1 if word == other else max(above, row[index - 1])
            before = above
    return row[-1]
