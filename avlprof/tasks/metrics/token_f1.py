"""Token F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from avlprof.tasks.metrics._base import best, spaced

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WIDE = "".join(map(chr, (*range(0x3001, 0x3004), *range(0x3008, 0x3012), 0x30FB, 0xFF01, 0xFF08, 0xFF09)))
_WIDE += "\uff0c\uff0e\uff1a\uff1b\uff1f"
_PUNCTUATION = str.maketrans("", "", string.punctuation + _WIDE)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words of the nearest answer.

    Words are a bag: their order is free, their number counts. Before the text is cut at white
    space it is lower-cased, and ASCII punctuation and the articles a, an, the go. Where
    prediction or answer has no word left, the score is 1 if neither has, else 0.

    Source: SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250) and its evaluation
    script; the case without words is that of SQuAD 2.0. In scripts without spaces (Chinese, Japanese,
    Thai, ...) every character is a word and their own punctuation goes too, as in MLQA (Lewis et al.
    2020, https://arxiv.org/abs/1910.07475) and CMRC 2018 (Cui et al. 2019,
    https://arxiv.org/abs/1810.07366).
    """
    return best(prediction, answers, _f1)


def _f1(prediction: str, answer: str) -> float:
    words, reference = Counter(_words(prediction)), Counter(_words(answer))
    if not words or not reference:
        return float(words == reference)
    return 2 * (words & reference).total() / (words.total() + reference.total())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", spaced(text.lower().translate(_PUNCTUATION))).split()
