"""Where a rule that holds up to some number stops to hold: the one bisection of the package."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], top: int) -> int:
    """The largest number in [0, `top`] for which a rule holds; 0, which is not asked, is taken to.

    Args:
        fits: holds up to some number and for none above it.
    """
    low, high = 0, top + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_share(fits: Callable[[float], bool], low: float, high: float, halvings: int) -> float:
    """A number in [`low`, `high`] for which a rule holds, at most `(high - low) / 2^halvings` too small.

    Args:
        fits: holds up to some number and for none above it; at `low`, which is not asked, it is
            taken to hold, and at `high` not to.
    """
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
