"""What every metric must satisfy."""

from __future__ import annotations

import random
from typing import ClassVar

import pytest

from avlprof.errors import UserError
from avlprof.tasks.metrics import Metric, load_metric

TEXTS = (
    "yes",
    "Two cats.",
    "the red circle at top left, blue word CAT at bottom",
    "3.5%",
    "1,200",
    "-7",
    "0",
    "don't know",
    "what?!  really",
    "Größe 10 μm",
    "左上",
    "the",
    "...",
    "nan",
    " ",
    "",
)


class MetricConformance:
    """Inherit and set `metric`, a name that `load_metric` knows; pytest then runs these tests.

    `texts` may be replaced by answers typical of the metric.
    """

    metric: str
    texts: ClassVar[tuple[str, ...]] = TEXTS

    @property
    def score(self) -> Metric:
        return load_metric(self.metric)

    def cases(self) -> list[tuple[str, list[str]]]:
        """Predictions with 1 to 10 answers: drawn from `texts`, whole or in part, and one another's."""
        rng = random.Random(0)

        def text() -> str:
            whole = rng.choice(self.texts)
            return whole if rng.random() < 0.7 else " ".join(w for w in whole.split() if rng.random() < 0.6)

        cases = [(text(), [text() for _ in range(rng.randint(1, 10))]) for _ in range(300)]
        return cases + [(rng.choice(answers), answers) for _, answers in cases[:100]]

    def test_is_documented(self) -> None:
        doc = self.score.__doc__
        assert doc is not None
        assert "Source" in doc, "the docstring must give the metric's source"

    def test_scores_are_from_zero_to_one(self) -> None:
        for prediction, answers in self.cases():
            score = self.score(prediction, answers)
            assert isinstance(score, float)
            assert 0.0 <= score <= 1.0, (prediction, answers)

    def test_what_every_answer_says_is_perfect(self) -> None:
        for text in self.texts:
            for count in range(1, 11):
                assert self.score(text, [text] * count) == 1.0, (text, count)

    def test_nonsense_scores_nothing(self) -> None:
        assert self.score("qqqq zzzz wwww", ["yes", "two cats"]) == 0.0

    def test_empty_prediction_is_wrong_when_the_answer_is_not_empty(self) -> None:
        assert self.score("", ["yes"]) == 0.0
        assert self.score(" \n", ["yes", "two cats"]) == 0.0

    def test_order_of_answers_is_free(self) -> None:
        rng = random.Random(1)
        for prediction, answers in self.cases():
            shuffled = rng.sample(answers, len(answers))
            assert self.score(prediction, shuffled) == self.score(prediction, answers)

    def test_is_deterministic_and_leaves_its_input_alone(self) -> None:
        for prediction, answers in self.cases():
            before = list(answers)
            first = self.score(prediction, answers)
            assert self.score(prediction, tuple(answers)) == first
            assert answers == before

    def test_white_space_around_a_prediction_is_free(self) -> None:
        for prediction, answers in self.cases():
            assert self.score(f" {prediction}\n", answers) == self.score(prediction, answers)

    def test_no_answer_is_refused(self) -> None:
        with pytest.raises(UserError, match="answers"):
            self.score("yes", [])
