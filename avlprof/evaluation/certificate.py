"""What samples say of a mean drop without a model of their scores: learn then test.

Policies are fixed before the samples are looked at, and budgets are tested from the largest down; the
first that is not shown ends it. So the chance that any budget is certified whose true mean drop is
larger than allowed is at most 1 - confidence, whatever the scores are distributed like (Angelopoulos et
al., *Learn then Test*, arXiv 2110.01052, with fixed-sequence testing).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avlprof.errors import UserError, counted

_STAKES: Final = 60  # of the betting test, spread evenly over their logarithms
_MOST: Final = 10_000_000  # samples beyond which nobody is told how many would do


@dataclass(frozen=True)
class Claim:
    """What a certificate is asked for.

    Attributes:
        drop: mean loss of the metric that is allowed, in (0, 1).
        confidence: in (0, 1).
        budgets: that are tested, different and at least one.
        samples: that nothing before has seen, for the tests.

    Raises:
        UserError: a number is out of range.
    """

    drop: float = 0.02
    confidence: float = 0.95
    budgets: tuple[float, ...] = (0.1, 0.2, 0.4)
    samples: int = 500

    def __post_init__(self) -> None:
        if not 0.0 < self.drop < 1.0:
            raise UserError(
                f"max_drop must be above 0 and below 1, in units of the task's metric, got {self.drop}"
            )
        if not 0.0 < self.confidence < 1.0:
            raise UserError(f"confidence must be above 0 and below 1, got {self.confidence}")
        if not self.budgets:
            raise UserError("a certificate needs at least one budget")
        if len(set(self.budgets)) < len(self.budgets):
            raise UserError(f"budgets of a certificate must differ, got {', '.join(map(str, self.budgets))}")
        if self.samples < 1:
            raise UserError(f"certify_samples must be 1 or more, got {self.samples}")


@dataclass(frozen=True)
class BudgetTest:
    """One budget's test: mean drop on `samples` samples, its p-value, and how many samples would do.

    `enough` is None where no number of samples like these would show it, or nobody asks.
    """

    budget: float
    mean: float
    p_value: float
    samples: int
    enough: int | None = None


@dataclass(frozen=True)
class Certificate:
    """The smallest budget at which the mean drop is shown to be at most `drop`; None for none.

    `tests` are in the order in which they were made, from the largest budget down; the last one failed
    unless all were shown.
    """

    drop: float
    confidence: float
    tests: tuple[BudgetTest, ...]

    @property
    def budget(self) -> float | None:
        """The smallest budget that was shown."""
        shown = [test.budget for test in self.tests if self.shows(test)]
        return min(shown, default=None)

    def shows(self, test: BudgetTest) -> bool:
        """Whether a test rejects that the drop is larger than allowed."""
        return test.p_value <= 1.0 - self.confidence

    def sentence(self) -> str:
        """What is certified, and what the first budget that is not would need."""
        share = f"{self.confidence:.0%}"
        if self.budget is None:
            said = f"no budget is certified to lose at most {self.drop:g} at {share} confidence"
        else:
            said = (
                f"certified: at a budget of {self.budget:g} the mean drop is at most {self.drop:g}, with "
                f"{share} confidence ({counted(self.tests[0].samples, 'sample')} that no search or proof saw)"
            )
        last = self.tests[-1]
        if self.shows(last):
            return said
        more = (
            f"about {last.enough:,} samples like these would do"
            if last.enough
            else "more samples like these would not do"
        )
        return f"{said}; at {last.budget:g} the drop is {last.mean:+.3f}, p {last.p_value:.2g}: {more}"


def certify(claim: Claim, drops: Callable[[float], ArrayLike]) -> Certificate:
    """Test budgets from the largest down until one is not shown to lose at most what is allowed.

    Args:
        drops: what the policy of a budget loses on each sample, `[n]`, dense minus policy, in [-1, 1], on
            the same samples for all; not asked for budgets that are not tested.

    Raises:
        UserError: there is no sample, or a drop is out of range.
    """
    tests, level = [], 1.0 - claim.confidence
    for budget in sorted(claim.budgets, reverse=True):
        values = _checked(drops(budget))
        p_value = drop_p_value(values, claim.drop)
        enough = None if p_value <= level else samples_enough(values, claim.drop, claim.confidence)
        tests.append(BudgetTest(budget, float(values.mean()), p_value, values.size, enough))
        if p_value > level:
            break
    return Certificate(claim.drop, claim.confidence, tuple(tests))


def drop_p_value(drops: ArrayLike, most: float) -> float:
    """p-value of the hypothesis that the mean drop is larger than `most`; valid for any number of samples.

    Twice the smaller one of two: Hoeffding-Bentkus of the losses alone, which gains do not make up for,
    and betting on the drops with their sign.
    """
    values = _checked(drops)
    losses = np.clip(values, 0.0, None)
    return min(
        1.0, 2.0 * min(hoeffding_bentkus(float(losses.mean()), values.size, most), betting(values, most))
    )


def hoeffding_bentkus(mean: float, samples: int, most: float) -> float:
    """p-value of a mean loss above `most`, of losses in [0, 1] whose mean over samples is `mean`.

    `min(exp(-n kl(mean, most)), e P(Binomial(n, most) <= ceil(n mean)))` (Bates et al., arXiv 2101.02703).
    """
    if mean >= most:
        return 1.0
    hoeffding = math.exp(-samples * _kl(mean, most))
    bentkus = math.e * _binomial(math.ceil(samples * mean - 1e-9), samples, most)
    return min(1.0, hoeffding, bentkus)


def betting(drops: NDArray[np.float64], most: float) -> float:
    """p-value of a mean drop above `most`, of drops in [-1, 1]: one over what a gambler has won.

    He stakes shares `s` of his capital on drops below `most`, which multiplies it by `1 - s (drop - most)`
    a sample; if the mean is above, he loses on average whatever he stakes, so his capital is above `1 / p`
    with a chance of at most p. His capital is the mean over stakes of 0.1% to all that cannot ruin him
    (Waudby-Smith and Ramdas, arXiv 2010.09686).
    """
    return float(math.exp(min(0.0, -_log_capital(_log_growth(drops, most)))))


def samples_enough(drops: NDArray[np.float64], most: float, confidence: float) -> int | None:
    """How many samples with the same drops in the same proportions would show it; None for no number."""
    level, growth = 1.0 - confidence, _log_growth(drops, most) / drops.size
    losses = float(np.clip(drops, 0.0, None).mean())

    def shown(samples: int) -> bool:
        capital = _log_capital(growth * samples)
        return 2.0 * min(hoeffding_bentkus(losses, samples, most), math.exp(-max(capital, 0.0))) <= level

    if not shown(_MOST):
        return None
    low, high = 0, _MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def _log_growth(drops: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Logarithm of the capital of each stake."""
    stakes = np.geomspace(1e-3, 1.0, _STAKES) / (1.0 - most) * (1.0 - 1e-6)
    return np.array([np.log1p(-stake * (drops - most)).sum() for stake in stakes])


def _log_capital(growth: NDArray[np.float64]) -> float:
    highest = float(growth.max())
    return highest + math.log(float(np.exp(growth - highest).mean()))


def _kl(a: float, b: float) -> float:
    """Divergence of two coins in nat."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def _binomial(successes: int, trials: int, chance: float) -> float:
    """P(Binomial(trials, chance) <= successes)."""
    k = np.arange(min(successes, trials) + 1, dtype=float)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    ways = log_factorials[trials] - log_factorials[: k.size] - log_factorials[trials - np.arange(k.size)]
    terms = ways + k * math.log(chance) + (trials - k) * math.log1p(-chance)
    highest = float(terms.max())
    return min(1.0, math.exp(highest) * float(np.exp(terms - highest).sum()))


def _checked(drops: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(drops, dtype=float).ravel()
    if values.size == 0 or not np.isfinite(values).all() or np.abs(values).max() > 1.0:
        raise UserError("a certificate needs samples whose drops are in [-1, 1]; use a metric in [0, 1]")
    return values
