"""Certificates hold as often as they say, against plain formulas and a thousand re-splits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from avlprof.errors import UserError
from avlprof.evaluation import certificate
from avlprof.evaluation.certificate import (
    BudgetTest,
    betting,
    drop_p_value,
    hoeffding_bentkus,
    samples_enough,
)


def certify(table, drop, confidence=0.95):
    """The certificate of a table of drops by budget."""
    return certificate.certify(certificate.Claim(drop, confidence, tuple(table)), table.__getitem__)


def binomial(successes, trials, chance):
    return sum(math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(successes + 1))


@pytest.mark.parametrize(
    ("mean", "n", "most"), [(0.0, 40, 0.1), (0.05, 60, 0.2), (0.013, 75, 0.1), (0.3, 9, 0.4)]
)
def test_hoeffding_bentkus_is_its_formula(mean, n, most):
    first = mean * math.log(mean / most) if mean else 0.0
    hoeffding = math.exp(-n * (first + (1 - mean) * math.log((1 - mean) / (1 - most))))
    bentkus = math.e * binomial(math.ceil(n * mean - 1e-9), n, most)
    assert hoeffding_bentkus(mean, n, most) == pytest.approx(min(1.0, hoeffding, bentkus), rel=1e-9)
    assert hoeffding_bentkus(most, n, most) == hoeffding_bentkus(most + 0.1, n, most) == 1.0


def test_bets_are_products_of_what_each_sample_pays():
    drops = np.array([0.0, 0.4, -0.3, 0.0, 0.1, -1.0])
    stakes = [10 ** (-3 + 3 * i / 59) / 0.9 * (1 - 1e-6) for i in range(60)]
    capital = np.mean([math.prod(1 - stake * (d - 0.1) for d in drops) for stake in stakes])
    assert betting(drops, 0.1) == pytest.approx(min(1.0, 1 / capital), rel=1e-9)
    assert betting(np.full(50, 0.3), 0.1) == 1.0


def population(rng, kind, size=20_000):
    """Drops of a kind; at an allowance of their true mean nothing may be certified."""
    return {
        "coins": rng.choice([0.0, 1.0], size, p=[0.93, 0.07]),
        "both ways": rng.choice([-1.0, 0.0, 1.0], size, p=[0.1, 0.74, 0.16]),
        "shares": np.clip(rng.normal(0.06, 0.3, size), -1, 1),
        "rare": rng.choice([0.0, 1.0], size, p=[0.9495, 0.0505]),
    }[kind]


@pytest.mark.parametrize("kind", ["coins", "both ways", "shares", "rare"])
def test_a_thousand_splits_certify_what_is_false_in_one_of_twenty_at_most(kind):
    rng = np.random.default_rng(3)
    drops = population(rng, kind)
    allowed = float(drops.mean())
    wrong = sum(drop_p_value(rng.choice(drops, 300), allowed) <= 0.05 for _ in range(1000))
    assert wrong <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95)


def test_a_sequence_of_budgets_errs_no_more_often_than_one():
    """Three budgets that lose .06 each: the first one tested ends it 19 times of 20."""
    rng = np.random.default_rng(5)
    table = {budget: rng.choice([-1.0, 0.0, 1.0], 20_000, p=[0.05, 0.84, 0.11]) for budget in (0.1, 0.2, 0.4)}
    wrong = 0
    for _ in range(300):
        rows = rng.integers(0, 20_000, 400)
        wrong += certify({b: d[rows] for b, d in table.items()}, 0.05).budget is not None
    assert wrong <= 15 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_power_is_that_of_a_test_that_knows_the_spread():
    """Dense and policy often differ, both ways: the sign counts, and a thousand samples are enough."""
    rng = np.random.default_rng(1)
    drops = rng.choice([-1.0, 0.0, 1.0], 1000, p=[0.04, 0.92, 0.04])
    assert drop_p_value(drops, 0.05) < 0.01
    assert hoeffding_bentkus(float(np.clip(drops, 0, None).mean()), 1000, 0.05) > 0.05
    assert drop_p_value(np.zeros(190), 0.02) <= 0.05 < drop_p_value(np.zeros(150), 0.02)


def test_the_smallest_budget_before_the_first_failure():
    rng = np.random.default_rng(2)
    good, bad = np.zeros(400), rng.choice([0.0, 1.0], 400, p=[0.7, 0.3])
    found = certify({0.1: good, 0.4: good, 0.2: bad}, 0.05)
    assert found.budget == 0.4
    assert [test.budget for test in found.tests] == [0.4, 0.2]
    assert "certified: at a budget of 0.4" in found.sentence()
    assert "more samples like these would not do" in found.sentence()
    assert certify({0.1: good, 0.4: good}, 0.05).budget == 0.1
    none = certify({0.2: bad}, 0.05)
    assert none.budget is None
    assert none.sentence().startswith("no budget is certified to lose at most 0.05 at 95% confidence")


def test_the_number_of_samples_that_would_do_does():
    rng = np.random.default_rng(4)
    drops = rng.choice([-0.5, 0.0, 1.0], 100, p=[0.05, 0.92, 0.03])
    assert drops.mean() < 0.04
    enough = samples_enough(drops, 0.05, 0.95)
    test = certify({0.2: drops}, 0.05).tests[0]
    assert test == BudgetTest(0.2, float(drops.mean()), drop_p_value(drops, 0.05), 100, enough)
    assert enough > 100
    times = -(-enough // 100)
    assert drop_p_value(np.tile(drops, times), 0.05) <= 0.05
    assert drop_p_value(np.tile(drops, times - 1), 0.05) > 0.05
    assert f"about {enough:,} samples like these would do" in certify({0.2: drops}, 0.05).sentence()


@pytest.mark.parametrize(
    ("drops", "drop", "confidence", "message"),
    [
        ({}, 0.1, 0.9, "at least one budget"),
        ({0.1: []}, 0.1, 0.9, "in [-1, 1]"),
        ({0.1: [0.0, math.nan]}, 0.1, 0.9, "in [-1, 1]"),
        ({0.1: [30.0]}, 0.1, 0.9, "a metric in [0, 1]"),
        ({0.1: [0.0]}, 0.0, 0.9, "max_drop must be above 0"),
        ({0.1: [0.0]}, 0.1, 1.0, "confidence must be above 0 and below 1"),
    ],
)
def test_what_cannot_be_certified_is_refused(drops, drop, confidence, message):
    with pytest.raises(UserError) as caught:
        certify(drops, drop, confidence)
    assert message in str(caught.value)
