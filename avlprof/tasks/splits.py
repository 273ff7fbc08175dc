"""How a set of samples without splits is halved."""

from __future__ import annotations

import hashlib

SEARCH = "search"
HELD_OUT = "held-out"
ALL = "all"


def half_of(sample_id: str) -> str:
    """`search` or `held-out`, by the lowest bit of the first byte of the SHA-256 of the id.

    A sample stays in its half when others are added or removed, on every machine. Halves are
    of equal size only on average.
    """
    return HELD_OUT if hashlib.sha256(sample_id.encode()).digest()[0] & 1 else SEARCH
