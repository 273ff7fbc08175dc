"""VQA accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence

from avlprof.tasks.metrics._base import required

_AGREEMENT = 3  # annotators who must have given the answer for the full score
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
# Contractions, spelled without the apostrophes, which do not tell answers apart.
_CONTRACTIONS = """
aint arent cant couldnt couldntve couldve didnt doesnt dont hadnt hadntve hasnt havent hed hedve hes
howd howll hows isnt itd itdve itll maam mightnt mightntve mightve mustnt mustve neednt notve oclock
oughtnt owsat shant shedve shouldnt shouldntve shouldve somebodyd somebodydve somebodyll somebodys
someoned someonedve someonell someones somethingd somethingdve somethingll thats thered theredve
therere theres theyd theydve theyll theyre theyve twas wasnt wedve werent weve whatll whatre whats
whatve whens whered wheres whereve whod whodve wholl whos whove whyll whyre whys wont wouldnt
wouldntve wouldve yall yallll yalldve youd youdve youll youre youve
"""
_CONTRACTED = frozenset(_CONTRACTIONS.split())


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with the annotators: min(matches / 3, 1), averaged over leaving out each of them.

    With the ten answers of VQAv2 this is the official accuracy: 1, 2, 3, 4 matches give 0.3,
    0.6, 0.9, 1. The same formula serves every number of answers from 4 up; with 2 or 3 answers,
    where three matches among the others are impossible, 3 becomes the number of the others; with
    one answer the score is 1 for a match. So the prediction that all annotators gave scores 1.

    Prediction and answers are normalised as the official code does a prediction: punctuation
    goes or becomes a space, periods go unless a digit follows, text is lower-cased, number words
    up to ten become digits, articles go, and contractions match without their apostrophes. (The
    official code spares the answers some of these steps; its data had them before.)

    Source: VQA (Antol et al. 2015, https://arxiv.org/abs/1505.00468), VQAv2
    (https://visualqa.org/evaluation.html) and https://github.com/GT-Vision-Lab/VQA.
    """
    wanted = normalize(prediction)
    matches = sum(normalize(answer) == wanted for answer in required(answers))
    others = len(answers) - 1
    if others == 0:
        return float(matches)
    enough = min(_AGREEMENT, others)
    without_a_match = matches * min(matches - 1, enough)
    without_another = (len(answers) - matches) * min(matches, enough)
    return (without_a_match + without_another) / (enough * len(answers))


def normalize(text: str) -> str:
    """A text in the form in which VQA compares answers."""
    text = " ".join(text.split())
    drop_all = _THOUSANDS.search(text) is not None
    bare = text
    for mark in _PUNCTUATION:
        apart = drop_all or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if apart else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", bare).lower().split()]
    return " ".join(_contracted(word) for word in words if word not in _ARTICLES)


def _contracted(word: str) -> str:
    bare = word.replace("'", "")
    return bare if bare in _CONTRACTED else word
