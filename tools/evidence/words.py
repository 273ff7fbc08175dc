"""Numbers as words: scores with intervals, differences, and what an interval shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from avlprof.evaluation import PairedDifference
from avlprof.policy import Score
from avlprof.policy.provenance import Difference

Shown = Literal["better", "worse", "same"]
KINDS: tuple[Shown, ...] = ("better", "worse", "same")


def shown(gap: PairedDifference) -> Shown:
    """What a saving shows: `better`, `worse`, or `same` where its interval holds 0."""
    return side(gap.difference.low, gap.difference.high)


def side(low: float, high: float) -> Shown:
    """On which side of 0 an interval lies; `same` where it holds 0."""
    if low > 0:
        return "better"
    return "worse" if high < 0 else "same"


def share_text(score: Score, digits: int = 0) -> str:
    """A mean with its interval, in percent."""
    return f"{score.mean:.{digits}%} [{score.low:.{digits}%}, {score.high:.{digits}%}]"


def score_text(score: Score) -> str:
    """A mean with its interval."""
    digits = 3 if score.high >= 0.01 else 4
    return f"{score.mean:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"


def gap_text(gap: PairedDifference) -> str:
    """A difference with its interval, in bold where the interval leaves out 0."""
    d = gap.difference
    digits = 3 if max(abs(d.low), abs(d.high)) >= 0.01 else 4
    text = f"{d.mean:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"
    return text if shown(gap) == "same" else f"**{text}**"


def noted_text(gap: Difference | None) -> str:
    """A difference as a proof notes it; empty when it has none."""
    if gap is None:
        return ""
    text = f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    return text if side(gap.low, gap.high) == "same" else f"**{text}**"


def told(subject: str, found: Mapping[float, Shown], texts: Mapping[Shown, str]) -> str:
    """`subject wins at 10% and 20%, ties at 40%`."""
    parts = []
    for kind in KINDS:
        if shares := [f"{share:.0%}" for share, word in found.items() if word == kind]:
            parts.append(f"{texts[kind]} at {listed(shares)}")
    return f"{subject} {', '.join(parts)}"


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    known = list(words)
    return " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def heading(*names: str) -> list[str]:
    """The head of a table."""
    return [row(*names), "|---" * len(names) + "|"]
