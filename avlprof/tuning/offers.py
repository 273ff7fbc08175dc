"""What of a search space is on offer, and the nearest of it to what a start wants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from avlprof.errors import UserError
from avlprof.policy import BITS, FULL
from avlprof.registry import unknown
from avlprof.tuning.candidate import WHOLE, Candidate

if TYPE_CHECKING:
    from avlprof.tuning.space import Space


def in_reach(space: Space, start: Candidate) -> Candidate:
    """A candidate with what the space does not offer replaced by the nearest that it does."""
    scored = space.reads and space.scores_core
    text_bits = nearest_bits(start.text_bits, space.text_bits)
    trades = space.text == "trade" and text_bits in (None, FULL)
    text = (start.text_share or 1.0, start.text_sink) if trades else (None, 0)
    leads = space.reads and space.leaders != (0,)
    return replace(
        start,
        **_pictures(space, start),
        scorer=start.scorer if start.scorer in space.scorers else space.scorers[0],
        heads=start.heads if start.heads in space.heads else space.heads[0],
        refresh_interval=nearest(start.refresh_interval, space.refreshes),
        refresh=start.refresh if start.refresh in space.refresh else space.refresh[0],
        leading=int(offered(start.leading, space.leaders)) if leads else None,
        text_share=text[0],
        text_sink=text[1],
        vision_bits=nearest_bits(start.vision_bits, space.bits),
        text_bits=text_bits,
        core_prompt=offered(start.core_prompt, space.core_prompts) if scored else None,
        core_memory=offered(start.core_memory, space.core_memories) if scored else None,
    )


def _pictures(space: Space, start: Candidate) -> dict[str, Any]:
    """How pictures are made smaller; whole ones where neither that nor another way is asked for."""
    if space.pictures == (WHOLE,):
        return {"pictures": None, "picture_share": 1.0}
    wanted = start.pictures or WHOLE
    kind = wanted if wanted in space.pictures else space.pictures[0]
    if kind == WHOLE:
        return {"pictures": kind, "picture_share": 1.0}
    return {"pictures": kind, "picture_share": offered(start.picture_share, space.picture_shares)}


def nearest(interval: int, intervals: Sequence[int]) -> int:
    """The shortest refresh interval on offer that is as long or longer, else the longest."""
    return min((k for k in intervals if k >= interval), default=max(intervals))


def precisions(bits: tuple[int, ...]) -> tuple[int | None, ...]:
    """Bits of the starts, the most first; None alone where they are not searched."""
    return (None,) if bits == (FULL,) else tuple(sorted(bits, reverse=True))


def few(bits: tuple[int, ...]) -> int | None:
    """Bits of a start that has no reason for others."""
    known = precisions(bits)
    return 4 if 4 in known else known[0]


def nearest_bits(wanted: int | None, bits: tuple[int, ...]) -> int | None:
    """The bits of a start that wants some, where they are on offer."""
    return wanted if wanted in precisions(bits) else few(bits)


def check_parts(name: str, values: Sequence[float]) -> None:
    """`UserError` unless `values` are what a field of `CoreScore` may have."""
    limit = 1.0 if name == "core_prompts" else 0.999
    for value in values:
        if not 0.0 <= value <= limit:
            raise UserError(f"{name} of the search space must be in [0, {limit:g}], got {value}")


def check_picture_shares(values: Sequence[float]) -> None:
    """`UserError` unless `values` are shares of vision tokens that smaller pictures may have."""
    for value in values:
        if not 0.0 < value < 1.0:
            raise UserError(f"picture_shares of the search space must be above 0 and below 1, got {value}")


def offered(value: float | None, offered: Sequence[float]) -> float:
    """The nearest on offer to a value; to 0 where there is none."""
    return min(offered, key=lambda other: abs(other - (value or 0.0)))


def check_names(kind: str, names: Iterable[str], known: Sequence[str]) -> None:
    """`UserError` unless all `names` are known ones of their `kind`."""
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)


def check_bits(name: str, values: Sequence[int]) -> None:
    """`UserError` unless `values` are bits that numbers may have."""
    for bits in values:
        if bits not in BITS:
            listed = ", ".join(map(str, BITS))
            raise UserError(f"{name} of the search space must be among {listed}, got {bits}")
