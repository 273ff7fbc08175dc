"""What heads of a layer have in common, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.analysis.intervals import Moments
from avlprof.policy import tokens
from avlprof.runs.meta import HEADS, LEARNED_SINK

STATISTICS = {
    "mass_system": "system",
    "mass_vision": "vision",
    "mass_text": "text",
    "mass_generated": "generated",
    "mass_sink": "sink",
    LEARNED_SINK: "learned_sink",
    "text_sink": "text_sink",
    "entropy": "entropy",
}
KINDS = (
    ("decode", "generated"),
    ("prefill", "last"),
    ("prefill", "system"),
    ("prefill", "text"),
    ("prefill", "vision"),
)
COLUMNS = ("layer", "head", "phase", "query", "statistic", "mean", "low", "high", "n")


class HeadMoments:
    """Running means over samples of single heads; takes the `stats` table of a part at a time."""

    def __init__(self, layers: int, heads: int, levels: Sequence[int], lags: Sequence[int]) -> None:
        self._covered = [f"coverage_{level}" for level in levels]
        self._columns = [*STATISTICS, *self._covered, *(f"overlap_{lag}" for lag in lags)]
        self._shape = (layers, heads, len(KINDS), len(self._columns))
        self._moments = Moments(self._shape)

    def add(self, stats: pd.DataFrame, vision: pd.Series[int]) -> None:
        """Take the samples of a table; rows of head averages (`head` -1) are left out.

        `vision` is the number of vision tokens by sample id.
        """
        ours = stats[stats["head"] >= 0].copy()
        if ours.empty:
            return
        count = ours["sample"].map(vision)
        ours[self._covered] = ours[self._covered].div(count.where(count > 0), axis=0)
        sample, names = pd.factorize(ours["sample"])
        kind = pd.Series(range(len(KINDS)), index=pd.MultiIndex.from_tuples(KINDS))
        kinds = kind.reindex(pd.MultiIndex.from_frame(ours[["phase", "query"]])).to_numpy()
        values = np.full((len(names), *self._shape), np.nan)
        values[sample, ours["layer"], ours["head"], kinds] = ours[self._columns]
        for one in values:
            self._moments.add(one)

    def table(self) -> pd.DataFrame:
        """`layer, head, phase, query, statistic, mean, low, high, n`; no row in a run of head averages.

        `statistic` is a modality, `sink`, `learned_sink` or `text_sink` (share of attention on it, on
        the first token, on the model's learned sink, on the first text tokens), `entropy` (nat),
        `coverage_<level>` (share of the vision tokens) or `overlap_<lag>` (share of the head's top set).
        """
        layers, heads, kinds, _ = self._shape
        axes = {"layer": range(layers), "head": range(heads), "kind": range(kinds)}
        table = self._moments.table(
            axes | {"statistic": [STATISTICS.get(name, name) for name in self._columns]}
        )
        learned = table["statistic"] == STATISTICS[LEARNED_SINK]
        if not table.loc[learned, "mean"].any():  # a model without them
            table = table[~learned].reset_index(drop=True)
        names = pd.DataFrame(KINDS, columns=["phase", "query"]).loc[table["kind"]].reset_index(drop=True)
        return pd.concat([table.drop(columns="kind"), names], axis=1)[list(COLUMNS)]


Array = NDArray[np.float64]
Scores = NDArray[np.float32]

HOLDS = 90
"""Per cent of a head's vision attention by which heads are compared, or what was measured nearest to it."""
LEAST_PART = 0.05
"""What a KV head that hardly looks at vision counts as, over the mean of its layer."""


def head_shares(table: pd.DataFrame, layers: int, kv_heads: int) -> tuple[tuple[float, ...], ...]:
    """What each KV head of each layer needs of vision, over its layer's mean: `head_shares` of a policy.

    A head needs as many vision tokens as hold `HOLDS` per cent of its attention to them, in the mean over
    text rows (else the last row) of the prompt; a KV head the mean of its query heads. 1 in layers of which
    nothing was recorded.

    Args:
        table: as `HeadMoments.table` gives it.
        layers: of the model.
        kv_heads: of each layer; they divide the heads of the table.
    """
    levels = {
        name: abs(int(name.split("_")[1]) - HOLDS) for name in table["statistic"] if "coverage_" in name
    }
    ours = table[(table["phase"] == "prefill") & (table["statistic"] == min(levels, key=lambda n: levels[n]))]
    query = next(name for name in ("text", "last") if ours.loc[ours["query"] == name, "mean"].notna().any())
    needs = ours[ours["query"] == query].pivot(index="layer", columns="head", values="mean")
    shares = []
    for layer in range(layers):
        own = needs.loc[layer].to_numpy(np.float64) if layer in needs.index else np.zeros(kv_heads)
        each = np.nan_to_num(own).reshape(kv_heads, -1).mean(axis=1)
        each = np.maximum(each / each.mean(), LEAST_PART) if each.any() else np.ones(kv_heads)
        shares.append(tuple(round(float(share), 4) for share in each / each.mean()))
    return tuple(shares)


QUERIES = {"last": "last", "step": "decode"}
SHARED = -1
PAIR_COLUMNS = ("layer_a", "head_a", "layer_b", "head_b", "query", "mean", "low", "high", "n")


def head_overlap(heads: Scores, shared: Scores, top_share: float) -> tuple[Array, Array]:
    """PPCI of single heads: share of a head's top set that is in another set, mean over rows.

    Rows in which either of the two gives vision nothing are left out. Source: A-VL, arXiv
    2409.14846 (percentile concordance index).

    Args:
        heads: vision scores `[R, L, H, N]` of R query rows.
        shared: their mean over heads `[R, L, N]`, whose sets are what a layer's heads share.
        top_share: the sets are the best `max(1, floor(top_share * N))` tokens; of equal scores the
            lower position is better.

    Returns:
        with the other heads of the layer `[L, H, H]`, and with the shared set of every layer
        `[L, H, L]`; NaN without a row in which both look at vision.
    """
    _, layers, count, size = *heads.shape[:3], max(1, tokens(top_share, heads.shape[3]))
    within, across = _Mean((layers, count, count), size), _Mean((layers, count, layers), size)
    for row, mean in zip(heads, shared, strict=True):
        (own, looks), (common, seen) = _top_sets(row, size), _top_sets(mean, size)
        both = own.reshape(layers * count, -1) @ common.T
        within.add(own @ own.mT, looks[:, :, None] & looks[:, None, :])
        across.add(both.reshape(across.shape), looks[:, :, None] & seen)
    return within.value(), across.value()


def _top_sets(scores: Scores, size: int) -> tuple[Scores, NDArray[np.bool_]]:
    """1 on the best `size` of each row of `scores [..., N]`, and which rows `[...]` are not all 0."""
    least = -np.partition(-scores, size - 1, axis=-1)[..., size - 1 : size]
    above, tied = scores > least, scores == least
    missing = size - above.sum(axis=-1, keepdims=True)
    chosen = above | (tied & (tied.cumsum(axis=-1) <= missing))
    return chosen.astype(np.float32), scores.sum(axis=-1) > 0


class _Mean:
    """A running mean of common tokens as a share of `size`; pairs that do not count are left out."""

    def __init__(self, shape: tuple[int, ...], size: int) -> None:
        self.shape, self._size = shape, size
        self._sum, self._count = np.zeros(shape), np.zeros(shape)

    def add(self, common: Scores, counts: NDArray[np.bool_]) -> None:
        self._sum += np.where(counts, common, 0.0)
        self._count += counts

    def value(self) -> Array:
        mean: Array = np.divide(
            self._sum, self._size * self._count, out=np.full(self.shape, np.nan), where=self._count > 0
        )
        return mean


class HeadOverlaps:
    """Running means of `head_overlap` over samples."""

    NAMES: Sequence[str] = tuple(f"{name}{suffix}" for name in QUERIES.values() for suffix in ("", HEADS))
    """Scores that it looks at."""

    def __init__(self, layers: int, heads: int, top_share: float) -> None:
        self._layers, self._heads, self._top_share = range(layers), range(heads), top_share
        self._within = Moments((layers, heads, heads, len(QUERIES)))
        self._across = Moments((layers, heads, layers, len(QUERIES)))

    def add(self, scores: dict[str, Scores]) -> None:
        """Take one more sample's `NAMES`."""
        pairs = []
        for name in QUERIES.values():
            heads, shared = scores[f"{name}{HEADS}"], scores[name]
            if name == "last":
                heads, shared = heads[None], shared[None]
            pairs.append(head_overlap(heads, shared, self._top_share))
        for moments, tables in zip((self._within, self._across), zip(*pairs, strict=True), strict=True):
            moments.add(np.stack(tables, axis=-1))

    def table(self) -> pd.DataFrame:
        """`layer_a, head_a, layer_b, head_b, query, mean, low, high, n`.

        Heads of one layer against each other, and every head against the shared set of every
        layer, where `head_b` is -1. No row without samples.
        """
        sides = {"layer_a": self._layers, "head_a": self._heads}
        within = self._within.table(sides | {"head_b": self._heads, "query": list(QUERIES)})
        across = self._across.table(sides | {"layer_b": self._layers, "query": list(QUERIES)})
        whole = pd.concat([within.assign(layer_b=within["layer_a"]), across.assign(head_b=SHARED)])
        return whole.sort_values(list(PAIR_COLUMNS[:5]), ignore_index=True)[list(PAIR_COLUMNS)]
