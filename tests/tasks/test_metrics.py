from __future__ import annotations

import itertools
import random
import re
from fractions import Fraction

import pytest

from avlprof.errors import UserError
from avlprof.tasks import METRICS, load_metric
from avlprof.testing.metrics import MetricConformance


class TestExactMatch(MetricConformance):
    metric = "exact_match"


class TestVqaAccuracy(MetricConformance):
    metric = "vqa_accuracy"


class TestAnls(MetricConformance):
    metric = "anls"


class TestRelaxedAccuracy(MetricConformance):
    metric = "relaxed_accuracy"


class TestTokenF1(MetricConformance):
    metric = "token_f1"


class TestRougeL(MetricConformance):
    metric = "rouge_l"


class TestContains(MetricConformance):
    metric = "contains"


def test_every_built_in_metric_has_its_conformance_test() -> None:
    tested = {c.metric for c in MetricConformance.__subclasses__()}
    assert tested >= {name for name in METRICS.names() if name in METRICS._builtin}


def test_an_unknown_metric_suggests_its_neighbour() -> None:
    with pytest.raises(UserError, match="'exact_mach'; did you mean exact_match"):
        load_metric("exact_mach")


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Red Circle.", ["red circle"], 1),
        ("  red \t circle\n", ["red circle"], 1),
        ("red circle !", ["red circle?"], 1),
        ("a red circle", ["red circle"], 0),
        ("red-circle", ["red circle"], 0),
        ("3.5", ["35"], 0),
        ("no", ["yes", "no"], 1),
        ("STRASSE", ["straße"], 1),
    ],
)
def test_exact_match_values(prediction: str, answers: list[str], score: float) -> None:
    assert load_metric("exact_match")(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the OCRBench says Hello  World", ["hello world"], 1),
        ("hello", ["hello world"], 0),
        ("312", ["12"], 1),
        ("anything", [""], 0),
        ("line one\nline two", ["one line"], 1),
        ("b", ["a", "B"], 1),
    ],
)
def test_contains_values(prediction: str, answers: list[str], score: float) -> None:
    assert load_metric("contains")(prediction, answers) == score


# matches among ten answers -> score, as https://visualqa.org/evaluation.html gives them
@pytest.mark.parametrize(
    ("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)]
)
def test_vqa_accuracy_of_ten_answers(matches: int, score: float) -> None:
    answers = ["blue"] * matches + [f"colour{i}" for i in range(10 - matches)]
    assert load_metric("vqa_accuracy")("Blue.", answers) == pytest.approx(score, abs=1e-12)


def test_vqa_accuracy_is_the_mean_over_every_left_out_answer() -> None:
    rng = random.Random(0)
    for _ in range(200):
        answers = [rng.choice("abcde") * 2 for _ in range(rng.randint(2, 12))]
        size = len(answers) - 1
        scores = [
            min(Fraction(subset.count("bb"), min(3, size)), Fraction(1))
            for subset in itertools.combinations(answers, size)
        ]
        expected = sum(scores) / len(scores)
        assert load_metric("vqa_accuracy")("bb", answers) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("Two", "2", True),
        ("none", "zero", True),
        ("eleven", "11", False),
        ("the  dog", "a dog", True),
        ("yes, it is", "yes it is", True),  # a mark beside a space goes
        ("yes,it is", "yes it is", True),  # one between letters becomes a space
        ("x-ray", "x ray", True),
        ("x-ray", "xray", False),
        ("1,000", "1000", True),  # a comma between digits goes
        ("3.5", "35", False),  # a period before a digit stays
        ("U.S.", "us", True),
        ("dont know", "don't know", True),
        ("shes", "she's", False),  # not among the official contractions
        ("lets", "let's", False),
        ("cats", "cat's", False),
        ("3 oclock", "three o'clock", True),
        ("new\nyork", "new york", True),
        ("red", "dark red", False),
    ],
)
def test_vqa_normalisation(prediction: str, answer: str, same: bool) -> None:
    for a, b in ((prediction, answer), (answer, prediction)):
        assert load_metric("vqa_accuracy")(a, [b] * 10) == float(same)


def edit_distance(a: str, b: str) -> int:
    """Wagner and Fischer's table, plainly."""
    rows = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        change = rows[i - 1][j - 1] + (a[i - 1] != b[j - 1])
        rows[i][j] = min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, change)
    return rows[-1][-1]


def test_anls_is_one_minus_edit_distance_over_length() -> None:
    rng = random.Random(0)
    for _ in range(300):
        truth = "".join(rng.choices("abcd", k=rng.randint(1, 12)))
        guess = "".join(c if rng.random() < 0.8 else rng.choice("abcd") for c in truth)[: rng.randint(1, 12)]
        similarity = 1 - Fraction(edit_distance(truth, guess), max(len(truth), len(guess)))
        expected = float(similarity) if similarity >= Fraction(1, 2) else 0.0
        assert load_metric("anls")(guess.upper(), [truth]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("sitting", ["kitten"], 1 - 3 / 7),  # the textbook pair, three edits
        ("Hello  World", ["hello world"], 1),
        ("ab", ["cd", "abc"], 2 / 3),  # the nearest answer counts
        ("ab", ["cb"], 0.5),  # at the threshold: kept
        ("abc", ["abcdefg"], 0),  # 3/7, below it
    ],
)
def test_anls_values(prediction: str, answers: list[str], score: float) -> None:
    assert load_metric("anls")(prediction, answers) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-102", "-100", 1),
        ("102", "-100", 0),
        ("50%", "0.5", 1),
        ("50%", "50", 0),
        ("51%", "50%", 1),
        ("0", "0", 1),
        ("0.001", "0", 0),  # nothing is within 5% of zero
        ("0", "0.001", 0),
        ("1,000", "1000", 0),
        ("1,000", "1,000", 1),
        ("1e3", "1000", 1),
        ("nan", "nan", 1),
        ("inf", "1", 0),
        ("1", "inf", 0),
        ("France", " france ", 1),
        ("Frances", "France", 0),
        ("%", "%", 1),
    ],
)
def test_relaxed_accuracy_values(prediction: str, answer: str, score: float) -> None:
    assert load_metric("relaxed_accuracy")(prediction, [answer]) == score
    assert load_metric("relaxed_accuracy")(prediction, ["something else", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the cat sat", ["a cat sat down"], 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # precision 2/2, recall 2/3
        ("blue circle, red star", ["red star, blue circle"], 1),
        ("cat cat", ["cat"], 2 / 3),  # words are counted
        ("dog", ["cat", "dog bone"], 2 / 3),
        ("U.S.", ["us"], 1),
        ("the", ["a"], 1),
        ("the", ["cat"], 0),
    ],
)
def test_token_f1_values(prediction: str, answers: list[str], score: float) -> None:
    assert load_metric("token_f1")(prediction, answers) == pytest.approx(score, abs=1e-12)


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    rng = random.Random(0)
    for _ in range(300):
        found = rng.choices(["red", "star", "blue", "left"], k=rng.randint(1, 7))
        wanted = rng.choices(["red", "star", "blue", "left"], k=rng.randint(1, 7))
        unclaimed, hits = list(wanted), 0
        for word in found:
            if word in unclaimed:
                unclaimed.remove(word)
                hits += 1
        precision, recall = Fraction(hits, len(found)), Fraction(hits, len(wanted))
        expected = 2 * precision * recall / (precision + recall) if hits else Fraction(0)
        score = load_metric("token_f1")(", ".join(found), [" ".join(wanted)])
        assert score == pytest.approx(float(expected), abs=1e-12)


# Lin (2004), section 3.1: against "police killed the gunman" the two candidates get 3/4 and 2/4;
# section 3.2: two references in one.
@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("police kill the gunman", ["police killed the gunman"], 3 / 4),
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),
        ("the gunman police killed", ["police killed the gunman"], 2 / 4),
        ("A dog, running!", ["a dog running"], 1),
        ("a dog", ["a big brown dog", "a cat"], 2 * 2 / (2 + 4)),
    ],
)
def test_rouge_l_values(prediction: str, answers: list[str], score: float) -> None:
    assert load_metric("rouge_l")(prediction, answers) == pytest.approx(score, abs=1e-12)


def test_rouge_l_is_f1_of_the_longest_common_subsequence() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.choices("xyz", k=rng.randint(1, 7)) for _ in range(2))
        subsequences = {picked for size in range(len(b) + 1) for picked in itertools.combinations(b, size)}
        longest = max(
            size
            for size in range(len(a) + 1)
            if any(picked in subsequences for picked in itertools.combinations(a, size))
        )
        recall, precision = Fraction(longest, len(b)), Fraction(longest, len(a))
        expected = 2 * recall * precision / (recall + precision) if longest else Fraction(0)
        score = load_metric("rouge_l")(" ".join(a), [" ".join(b)])
        assert score == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("name", METRICS.names())
def test_docstrings_give_an_address(name: str) -> None:
    assert re.search(r"https://\S+", load_metric(name).__doc__ or "")
