"""Two profiles, layer by layer: two tasks, two models, or dense against a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.analysis.intervals import t_interval, welch_interval
from avlprof.analysis.tables import KEYS, ROW
from avlprof.errors import UserError

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

Array = NDArray[np.float64]

# a statistic is comparable only where these settings of the runs agree
DEPENDS = {"overlap": ("top_share",), "window": ("text_sink", "distances"), "text_sink": ("text_sink",)}


def diff(here: Profile, other: Profile) -> pd.DataFrame:
    """What differs between two profiles, per layer, with 95% intervals.

    Where both runs are of one task and share samples (two or more ids, at least half of those of
    the smaller run), the shared samples are compared each with itself: Student's interval of the
    mean difference. Otherwise the samples are taken as independent: Welch's interval of the
    difference of means. Intervals hold one at a time: of 20 true zeros one is missed on average.

    Statistics that the runs' settings make incomparable (another `top_share`, other levels) are
    left out.

    Returns:
        `layer, phase, query, statistic, here, other, mean, low, high, n, n_other, how`: `mean` is
        `here` less `other`, statistics and units are those of `Profile.by_sample`, `how` is
        `paired` or `unpaired`.

    Raises:
        UserError: the models differ in their number of layers.
    """
    if here.layers != other.layers:
        raise UserError(
            f"profiles of {here.layers} and {other.layers} layers cannot be compared layer by layer; "
            "compare runs of models with as many layers"
        )
    ours, theirs = here["by_sample"], other["by_sample"]
    names = _comparable(here, other, ours, theirs)
    shared = _shared(here, other)
    if not shared:
        return _unpaired(ours, theirs, names)
    ours, theirs = (table[table["sample"].isin(shared)].set_index(ROW)[names] for table in (ours, theirs))
    return _paired(ours, theirs)


def _comparable(here: Profile, other: Profile, ours: pd.DataFrame, theirs: pd.DataFrame) -> list[str]:
    a, b = here.meta.settings, other.meta.settings
    names = [name for name in ours.columns.drop(ROW) if name in theirs.columns]
    differ = {name for name, fields in DEPENDS.items() if any(getattr(a, f) != getattr(b, f) for f in fields)}
    return [name for name in names if not name.startswith(tuple(differ))]


def _shared(here: Profile, other: Profile) -> set[str]:
    """Ids to pair; ids of different tasks mean nothing to each other."""
    if here.meta.settings.task != other.meta.settings.task:
        return set()
    ids = [set(profile.frames["samples"]["sample"]) for profile in (here, other)]
    shared: set[str] = ids[0] & ids[1]
    return shared if len(shared) >= 2 and 2 * len(shared) >= min(map(len, ids)) else set()


def _paired(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    ours, theirs = ours.astype(np.float64).align(theirs.astype(np.float64), join="inner")
    both = (ours.notna() & theirs.notna()).to_numpy()
    ours, theirs = ours.where(both), theirs.where(both)
    a, b, change = (_moments(table) for table in (ours, theirs, ours - theirs))
    low, high = t_interval(change["mean"], change["var"], change["count"])
    return _tidy(a, b, low, high, "paired")


def _unpaired(ours: pd.DataFrame, theirs: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    a, b = (_moments(table.set_index(ROW)[names].astype(np.float64)) for table in (ours, theirs))
    a, b = a.align(b, join="inner", axis=0)
    low, high = welch_interval(a["mean"], a["var"], a["count"], b["mean"], b["var"], b["count"])
    return _tidy(a, b, low, high, "unpaired")


def _moments(table: pd.DataFrame) -> pd.DataFrame:
    """`mean, var, count` over samples, one row for each layer, phase, query and statistic."""
    groups = table.groupby(KEYS, sort=True)
    kinds = {"mean": groups.mean(), "var": groups.var(), "count": groups.count()}
    return pd.DataFrame({name: kind.rename_axis(columns="statistic").stack() for name, kind in kinds.items()})


def _tidy(a: pd.DataFrame, b: pd.DataFrame, low: Array, high: Array, how: str) -> pd.DataFrame:
    table = pd.DataFrame({"here": a["mean"], "other": b["mean"], "mean": a["mean"] - b["mean"]})
    table = table.assign(low=low, high=high, n=a["count"], n_other=b["count"], how=how)
    return table[(table["n"] > 0) & (table["n_other"] > 0)].reset_index()
