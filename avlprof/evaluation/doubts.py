"""Why samples cannot show what is asked of them: too few, all alike, or nothing to lose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from avlprof.errors import UserError
from avlprof.evaluation.intervals import PairedDifference
from avlprof.tasks import Sample, load_metric

FEWEST = 10
"""Samples from which on a bootstrap interval is taken for one; fewer are too few to resample."""

_GUESSES = 20  # most frequent references that are tried as the one answer to everything


@dataclass(frozen=True)
class Guess:
    """The one answer that scores best when every sample gets it: what is had without looking."""

    answer: str
    score: float


def best_guess(metric: str, samples: Sequence[Sample]) -> Guess:
    """The best of the most frequent references, given to every sample alike."""
    judge = load_metric(metric)
    known = Counter(answer for sample in samples for answer in sample.answers)
    scored = [
        Guess(text, float(np.mean([judge(text, sample.answers) for sample in samples])))
        for text, _ in known.most_common(_GUESSES)
    ]
    return max(scored, key=lambda guess: guess.score, default=Guess("", 0.0))


def samples_needed(margin: float, sd: float, power: float = 0.8) -> int:
    """Samples with which a policy that is just as good is shown not to be inferior, mostly.

    `((z(0.975) + z(power)) * sd / margin)^2`, the inverse of `detectable_drop`.
    """
    normal = NormalDist()
    return math.ceil(((normal.inv_cdf(0.975) + normal.inv_cdf(power)) * sd / margin) ** 2)


def few_samples(samples: int) -> str | None:
    """A sentence when intervals over so many samples say nothing."""
    if samples >= FEWEST:
        return None
    many = "1 sample is" if samples == 1 else f"{samples} samples are"
    return f"{many} too few for an interval ({FEWEST} or more are needed)"


def dense_doubt(dense: NDArray[np.float64], guess: Guess | None = None) -> str | None:
    """A sentence when the dense model itself is not above what is had without looking."""
    mean = float(dense.mean())
    if mean <= 0.0:
        return "dense scores 0 on every sample, so no policy can lose anything"
    if guess is not None and mean <= guess.score:
        answer = guess.answer if len(guess.answer) <= 40 else f"{guess.answer[:37]}..."
        blind = f"'{answer}' as the answer to everything ({guess.score:.3f})"
        return f"dense scores {mean:.3f}, no more than {blind}"
    return None


def sample_warnings(dense: NDArray[np.float64]) -> list[str]:
    """What a table over these samples cannot show, a sentence each; `dense` are the stock model's scores."""
    few, nothing = few_samples(len(dense)), dense_doubt(dense)
    sentences = [f"{few}: read those shown as no more than the spread of the samples"] if few else []
    return [*sentences, *([f"{nothing}: no policy can be judged by these samples"] if nothing else [])]


def tie_doubts(paired: PairedDifference, margin: float, theirs: NDArray[np.float64], who: str) -> list[str]:
    """Why a difference, whatever its interval, cannot show a loss of at most `margin` to `who`.

    The number of samples is held against what a tie takes, unless the difference is plainly above 0.
    """
    gap, score = paired.difference, float(theirs.mean())
    doubts = [text for text in [few_samples(gap.samples)] if text]
    if paired.sd == 0.0:
        same = "no sample tells the two apart" if gap.mean == 0.0 else "all differences are equal"
        doubts.append(f"{same}, so the interval has no width")
    if 0.0 < score <= margin:
        doubts.append(f"a margin of {margin:g} is all that {who} scores ({score:.3f})")
    plainly_better = gap.low > 0.0 and paired.p_value < 0.05
    if margin > 0.0 and math.isfinite(paired.sd) and not plainly_better:
        needed = samples_needed(margin, paired.sd)
        if needed > gap.samples:
            doubts.append(f"{gap.samples} samples, where a tie within {margin:g} takes about {needed:,}")
    return doubts


def check_finite(scores: NDArray[np.float64], metric: str, names: Sequence[str]) -> None:
    """`UserError` when a metric gave what is no number; the message names the first sample."""
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise UserError(
            f"metric '{metric}' gave {scores[wrong[0]]} for sample '{names[wrong[0]]}' "
            f"({len(wrong)} of {len(scores)} samples); a metric gives a number in [0, 1]"
        )
