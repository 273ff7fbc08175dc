"""What closed routes cost: the tables of a knockout, with intervals, and what attention had said."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from avlprof.evaluation.doubts import few_samples, sample_warnings
from avlprof.evaluation.intervals import CONFIDENCE, RESAMPLES, mean_interval, paired_difference
from avlprof.files import replacing, write_text

ALL: Final = -1
"""Stands for every layer, and for every head, where a number would stand for one."""

COLUMNS = (
    *("route", "layer", "head", "first", "last", "samples", "kl", "kl_low", "kl_high", "agreement", "same"),
    *("score", "difference", "difference_low", "difference_high", "p_value"),
)
BESIDE = ("route", "attention", "layers", "samples", "paired", "rank_correlation", "low", "high")
FEWEST_LAYERS = 4
"""Layers from which on a rank correlation over them is worked out."""

_ROWS = {
    "question": (("prefill", "text"),),
    "system": (("prefill", "system"),),
    "vision": (("prefill", "vision"),),
    "last": (("prefill", "last"),),
    "generated": (("decode", "generated"),),
    "answer": (("decode", "generated"), ("prefill", "last")),
}
_MASSES = {
    "vision": "mass_vision",
    "question": "mass_text",
    "system": "mass_system",
    "generated": "mass_generated",
}
_MEASURED = ("kl", "score", "dense")
Array = NDArray[np.float64]


class Traced(Protocol):
    """A profile of a traced run, as far as this page of it is looked at."""

    def __getitem__(self, name: str) -> pd.DataFrame:
        """A table by name."""


@dataclass(frozen=True)
class Knockout:
    """Losses of a model's dense answers under closed routes; `docs/knockout.md` explains the numbers.

    `losses` has one row per `route, layer, head, sample`: sample by sample, with the cuts in one order.
    `layer` is the one that the closed layers stand around (`first` to `last`), -1 for all of them at once;
    `head` is -1 for all heads. `kl` is nat a token from dense to cut, `same` is 1 where no token of the
    answer changes, `score` and `dense` are the task's metric of the answer under the cut and of the dense
    one (NaN where answers were not judged).
    `meta` says what was measured, and with what.
    """

    meta: dict[str, Any]
    losses: pd.DataFrame

    def frame(self) -> pd.DataFrame:
        """The tidy table of losses, a copy."""
        return self.losses.copy()

    def summary(self) -> pd.DataFrame:
        """One row a cut, in the order of the losses; columns `COLUMNS`.

        Means over samples. `kl` has a 95% bootstrap interval, and so has `difference`, the metric under the
        cut less the dense one, paired by sample; `p_value` is of a sign-flip test, for whole layers alone,
        and not corrected for the number of rows.
        """
        return self._summary.copy()

    @cached_property
    def _summary(self) -> pd.DataFrame:
        """Worked out for all cuts at once: there may be thousands of heads."""
        keys, samples = ["route", "layer", "head", "first", "last"], self.losses["sample"].nunique()
        table = self.losses.groupby(keys, sort=False)[["agreement", "same", "score"]].mean().reset_index()
        columns = {name: self.losses[name].to_numpy(float).reshape(samples, -1) for name in _MEASURED}
        kl, score, dense = (columns[name] for name in _MEASURED)
        table["samples"] = samples
        table["kl"], table["kl_low"], table["kl_high"] = intervals(kl)
        table["difference"], table["difference_low"], table["difference_high"] = intervals(score - dense)
        table["p_value"] = math.nan
        if self.meta["judged"]:
            for row in np.flatnonzero(table["head"] == ALL):
                table.loc[row, "p_value"] = paired_difference(score[:, row], dense[:, row]).p_value
        return table[list(COLUMNS)]

    def beside(self, profile: Traced) -> pd.DataFrame:
        """What a layer's damage has to do with its attention, a row a route; columns `BESIDE`.

        Spearman's rank correlation over layers of the mean `kl` of closing a route there with the mean share
        of attention that the route's rows give its columns. The 95% percentile bootstrap is over samples,
        the same ones for both where both have them (`paired`); layers are not resampled, so it says how well
        this model's correlation is known, and nothing of other models. Routes that a trace says nothing
        of, and knockouts of `rest`, of fewer than 4 layers or of none that differ, are left out.
        """
        if self.meta["window"] == "rest":
            return pd.DataFrame(columns=list(BESIDE))
        rows = []
        for route in self.meta["routes"]:
            damage, spans = self._by_layer(route)
            found = attention_of(route, profile)
            if found is None or len(spans) < FEWEST_LAYERS:
                continue
            name, mass = found
            mass = pd.DataFrame({layer: mass[list(span)].mean(axis=1) for layer, span in spans.items()})
            correlation = rank_correlation(damage, mass)
            if correlation is not None:
                rows.append({"route": route, "attention": name, "layers": len(spans)} | correlation)
        return pd.DataFrame(rows, columns=list(BESIDE))

    def attention(self, profile: Traced) -> pd.DataFrame:
        """`route, layer, mean, low, high`: share of attention of the routes that `beside` has, over samples.

        Layers are those that a route was closed around, and each stands for all that were closed with it.
        """
        tables = []
        for route in self.beside(profile)["route"]:
            _, spans = self._by_layer(route)
            found = attention_of(route, profile)
            assert found is not None
            for layer, span in spans.items():
                share = mean_interval(found[1][list(span)].mean(axis=1).dropna())
                tables.append((route, layer, share.mean, share.low, share.high))
        return pd.DataFrame(tables, columns=["route", "layer", "mean", "low", "high"])

    def warnings(self) -> list[str]:
        """What these samples cannot show, and routes that were never open, a sentence each."""
        dense = self.losses.groupby("sample", sort=False)["dense"].first().to_numpy(float)
        few = few_samples(len(dense))
        sentences = sample_warnings(dense) if self.meta["judged"] else [few] if few else []
        whole = self.losses[self.losses["layer"] == ALL].groupby("route", sort=False)["kl"].max()
        return sentences + [
            f"route {route} changes nothing, even closed in every layer: no row of these prompts and answers "
            "could look that way"
            for route, most in whole.items()
            if most == 0.0
        ]

    def to_csv(self, path: Path | str) -> Path:
        """Write the summary as CSV; returns the path."""
        with replacing(Path(path)) as partial:
            self.summary().to_csv(partial, index=False)
        return Path(path)

    def to_json(self, path: Path | str, profile: Traced | None = None) -> Path:
        """Write `meta`, warnings, summary and `beside(profile)` as JSON (NaN as null); returns the path."""
        tables = {"summary": self.summary()}
        if profile is not None:
            tables["beside"] = self.beside(profile)
        records = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        whole = {"meta": self.meta, "warnings": self.warnings(), **records}
        write_text(Path(path), json.dumps(whole, indent=2) + "\n")
        return Path(path)

    def to_parquet(self, path: Path | str) -> Path:
        """Write the table of losses as parquet; returns the path."""
        with replacing(Path(path)) as partial:
            self.losses.to_parquet(partial, index=False)
        return Path(path)

    def _by_layer(self, route: str) -> tuple[pd.DataFrame, dict[int, range]]:
        """`kl`, a row a sample and a column a layer, and the layers that were closed around each."""
        own = self.losses.query("route == @route and layer != @ALL and head == @ALL")
        spans = own.groupby("layer")[["first", "last"]].first()
        ends = zip(spans.index.tolist(), spans.to_numpy(int).tolist(), strict=True)
        layers = {int(layer): range(first, last + 1) for layer, (first, last) in ends}
        return own.pivot(index="sample", columns="layer", values="kl"), layers


def attention_of(route: str, profile: Traced) -> tuple[str, pd.DataFrame] | None:
    """What a trace says of a route: in words, and the share of attention by sample (rows) and layer.

    None where it says nothing: of rows that were not traced, or a route that ends at the answer.
    """
    source, target = route.split("-to-")
    column = _MASSES.get(target)
    table = profile["by_sample"]
    for phase, query in _ROWS[source] if column else ():
        own = table[(table["phase"] == phase) & (table["query"] == query)]
        if not own.empty:
            wide = own.pivot(index="sample", columns="layer", values=column).astype(float)
            return f"{query} rows ({phase}) on {target}", wide
    return None


def rank_correlation(damage: pd.DataFrame, mass: pd.DataFrame) -> dict[str, Any] | None:
    """Spearman's correlation over columns (layers) of the means over rows (samples), with its interval.

    Columns are the same; samples that both have are resampled together, else each for itself. None
    where the means of either are all alike.
    """
    damage, mass = damage.dropna(), mass.dropna()
    common = damage.index.intersection(mass.index)
    paired = len(common) >= 2
    if paired:
        damage, mass = damage.loc[common], mass.loc[common]
    a, b = damage.to_numpy(float), mass[damage.columns].to_numpy(float)
    if not len(a) or not len(b) or min(np.ptp(a.mean(axis=0)), np.ptp(b.mean(axis=0))) == 0.0:
        return None
    rho = float(spearmanr(a.mean(axis=0), b.mean(axis=0)).statistic)
    random = np.random.default_rng(0)
    first = random.integers(0, len(a), (RESAMPLES, len(a)))
    second = first if paired else random.integers(0, len(b), (RESAMPLES, len(b)))
    rhos = _row_correlations(*(rankdata(_means(x, draw), axis=1) for x, draw in ((a, first), (b, second))))
    tail = (1.0 - CONFIDENCE) / 2
    known = rhos[np.isfinite(rhos)]
    low, high = np.quantile(known, [tail, 1.0 - tail]) if len(known) and len(a) > 1 else (math.nan, math.nan)
    return {
        "samples": len(a),
        "paired": paired,
        "rank_correlation": rho,
        "low": float(low),
        "high": float(high),
    }


def intervals(values: Array) -> tuple[Array, Array, Array]:
    """`mean_interval` of each column of `values [samples, columns]`: means, lower ends, upper ends."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means, tail = _means(values, draws), (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    mean, flat = values.mean(axis=0), np.ptp(values, axis=0) == 0.0
    return mean, np.where(flat, mean, low), np.where(flat, mean, high)


def _means(values: Array, draws: NDArray[np.int64]) -> Array:
    """Means `[resamples, layers]` of drawn rows of `values [samples, layers]`."""
    counts = np.stack([np.bincount(draw, minlength=len(values)) for draw in draws])
    means: Array = counts @ values / len(values)
    return means


def _row_correlations(a: Array, b: Array) -> Array:
    """Pearson's correlation of each row of `a` with that row of `b`."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return found


def words(beside: pd.DataFrame) -> list[str]:
    """What `Knockout.beside` says, a sentence a row."""
    sentences = []
    for row in beside.to_dict("records"):
        low, high = row["low"], row["high"]
        known = math.isfinite(low)
        interval = f" [{low:+.2f}, {high:+.2f}]" if known else ""
        sure = "" if not known or low > 0.0 or high < 0.0 else ", which may be none"
        sentences.append(
            f"{row['route']}: over {row['layers']} layers, damage and attention of {row['attention']} have a "
            f"rank correlation of {row['rank_correlation']:+.2f}{interval}{sure}"
        )
    return sentences
