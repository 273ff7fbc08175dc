"""Pictures side by side on one panel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GAP = 0.06
"""Room between pictures, in heights of one."""


@dataclass(frozen=True)
class Arrangement:
    """Where pictures stand on a panel of `width` x `height`, in heights of one picture.

    `places` are left, right, bottom, top of each, with y running down, as `imshow` takes them.
    """

    width: float
    height: float
    places: tuple[tuple[float, float, float, float], ...]


def arrange(sizes: Sequence[tuple[int, int]]) -> Arrangement:
    """Pictures of (width, height) in reading order, all drawn equally high, about as wide as tall."""
    widths = [width / height for width, height in sizes]
    across = math.sqrt(sum(widths)) if len(sizes) > 2 else sum(widths)
    places, x, y, widest = [], 0.0, 0.0, 0.0
    for width in widths:
        if x and x + width > across + 0.5:
            x, y = 0.0, y + 1 + GAP
        places.append((x, x + width, y + 1, y))
        widest = max(widest, x + width)
        x += width + GAP
    return Arrangement(widest, y + 1, tuple(places))
