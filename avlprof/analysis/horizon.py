"""The layer beyond which vision carries no mass."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.errors import UserError

Array = NDArray[np.float64]
QUERIES = ("text", "last", "generated")
RESAMPLES, CHUNK = 1000, 100


def horizon(table: pd.DataFrame, layers: int, threshold: float = 0.01, seed: int = 0) -> pd.DataFrame:
    """The smallest layer from which on vision gets less than `threshold` of the attention.

    That is the smallest h for which the vision mass of every layer from h on, mean over samples,
    is below the threshold; 0 when vision never gets more, none when the last layer still gives
    vision that much. The interval is the 95% percentile bootstrap over samples: the same rule on
    the means of 1000 resamples of the samples, none counted above every layer.

    The term is of "information horizon", arXiv 2512.07580. There it is where removing a vision
    token no longer changes the output; here it is read off the attention, which says where vision
    is no longer looked at, and not what would be lost.

    Args:
        table: a table of `by_sample`, of samples with vision tokens.
        layers: decoder layers of the model.
        threshold: share of attention, in (0, 1].
        seed: of the bootstrap.

    Returns:
        `query, layer, low, high, to_the_end, n`: a row for each of the queries `text`, `last` and
        `generated` that the run has, and `any`, the last of their horizons. `layer`, `low` and
        `high` are missing for none; `to_the_end` is the share of samples whose own last layer
        still gives vision the threshold or more.

    Raises:
        UserError: the threshold is out of range.
    """
    if not 0.0 < threshold <= 1.0:
        raise UserError(f"threshold must be in (0, 1], got {threshold}")
    ours = table[table["query"].isin(QUERIES)]
    wide = ours.pivot(index="sample", columns=["query", "layer"], values="mass_vision")
    queries = [query for query in QUERIES if (ours["query"] == query).any()]
    if not queries:
        return _table([])
    every = wide.reindex(columns=pd.MultiIndex.from_product([queries, range(layers)]))
    masses = every.to_numpy(np.float64).reshape(len(wide), len(queries), layers).swapaxes(0, 1)
    first = _first_beyond(_mean(masses, np.ones((1, len(wide)))), threshold)
    resampled = np.concatenate(_resampled(masses, threshold, np.random.default_rng(seed)))
    groups = {query: [index] for index, query in enumerate(queries)} | {"any": list(range(len(queries)))}
    return _table(
        [
            _row(query, masses[of], first[0, of].max(), resampled[:, of].max(axis=1), threshold)
            for query, of in groups.items()
        ]
    )


def _row(
    query: str, masses: Array, layer: int, resampled: NDArray[np.int64], threshold: float
) -> dict[str, object]:
    layers, last = masses.shape[-1], masses[..., -1]
    seen = ~np.isnan(last).all(axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    several = seen.sum() > 1
    return {
        "query": query,
        "layer": _or_none(layer, layers),
        "low": _or_none(low, layers) if several else None,
        "high": _or_none(high, layers) if several else None,
        "to_the_end": float((np.nanmax(last[:, seen], axis=0) >= threshold).mean()),
        "n": int(seen.sum()),
    }


def _resampled(masses: Array, threshold: float, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Horizons `[CHUNK, Q]` of resampled samples, a chunk at a time."""
    samples = masses.shape[1]
    even = np.full(samples, 1 / samples)
    return [
        _first_beyond(_mean(masses, rng.multinomial(samples, even, size=CHUNK).astype(float)), threshold)
        for _ in range(RESAMPLES // CHUNK)
    ]


def _mean(masses: Array, weights: Array) -> Array:
    """Weighted means `[B, Q, L]` of `masses [Q, S, L]` over samples; `weights [B, S]`. NaN is left out."""
    seen = ~np.isnan(masses)
    total = np.einsum("bs,qsl->bql", weights, np.where(seen, masses, 0.0), optimize=True)
    count = np.einsum("bs,qsl->bql", weights, seen.astype(float), optimize=True)
    mean: Array = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return mean


def _first_beyond(means: Array, threshold: float) -> NDArray[np.int64]:
    """`[B, Q, L]` to the layers `[B, Q]` behind the last one that reaches the threshold; L for none."""
    layers = np.arange(1, means.shape[-1] + 1)
    first: NDArray[np.int64] = np.where(means >= threshold, layers, 0).max(axis=-1)
    return first


def _or_none(layer: int, layers: int) -> int | None:
    return None if layer >= layers else int(layer)


def _table(rows: list[dict[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["query", "layer", "low", "high", "to_the_end", "n"])
    return table.astype({name: "Int64" for name in ("layer", "low", "high")} | {"n": "int64"})
