"""What a profile says, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from avlprof.analysis.profile import answered
from avlprof.analysis.tables import refresh_from_drift
from avlprof.analysis.window import windows_for
from avlprof.models import small, tiny

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

ENOUGH = 10
"""Samples, and long answers, from which on there is advice."""

_OWN = {
    "tiny": (("shapes",), tiny.FOREIGN),
    "tiny-mrope": (("shapes", "shapes-sizes"), tiny.FOREIGN),
    small.NAME: (("pages",), small.FOREIGN),
}
_WHEN = {"generated": "while decoding", "last": "in the last prompt row"}


def findings(profile: Profile) -> list[str]:
    """What was found, one sentence each: where the model looks at the image and what text it needs.

    Sentences are about decoding steps, or about the last prompt row in a run without decoding.
    Layers count from 0. What a run does not show is left out: layers are told apart only where their
    95% intervals part, and advice needs `ENOUGH` answers.
    """
    sentences = _foreign(profile)
    if profile.frames["coverage_curve"].empty:
        sentences.append("No sample has vision tokens, so there is nothing to say about vision.")
    else:
        sentences += [
            _looking(profile),
            _horizon(profile),
            *_tokens(profile),
            *_heads(profile),
            *_drift(profile),
        ]
    sentences += [*_window(profile), _sink(profile)]
    if lost := profile.meta.not_finite:
        sentences.append(
            f"This is of {profile.meta.samples} of {profile.meta.samples + lost} samples: the attention of "
            f"the others is not finite; trace them again with dtype bfloat16 or float32."
        )
    if profile.meta.samples < ENOUGH:
        few = "1 sample" if profile.meta.samples == 1 else f"{profile.meta.samples} samples"
        sentences.append(f"All of this rests on {few}: trace more before you rely on it.")
    return sentences


def _foreign(profile: Profile) -> list[str]:
    """A warning where a model that knows one task alone was shown what it does not know."""
    settings = profile.meta.settings
    own, sentence = _OWN.get(settings.model, ((), ""))
    return [] if settings.task.partition(":")[0] in own or not own else [f"Beware: {sentence}."]


def _looking(profile: Profile) -> str:
    query = answered(profile.frames)
    rows = _rows(profile.frames["mass"], query=query, modality="vision")
    mass = rows["mean"]
    if mass.max() <= 0.0:
        return f"No layer looks at the image {_WHEN[query]}."
    mainly = [int(layer) for layer in mass.index[mass >= mass.max() / 2]]
    most, least = _apart(rows, mainly), _apart(rows, [_first(mass, 0)], lowest=True)
    if set(most) & set(least):  # the highest alone may part where half of it does not
        most = _apart(rows, [_first(mass, -1)])
    if set(most) & set(least):
        apart = "" if len(rows) == 1 else "; the samples do not show which layer looks more than another"
        return f"The image gets {_range(mass)} of a layer's attention ({_WHEN[query]}){apart}."
    high, low = mass[most], mass[least]
    if len(most) == 1:
        sentence = f"Layer {most[0]} looks at the image most, with {_percent(high.max())} of its attention"
    else:
        sentence = f"{_layers(most)} look at the image most, with {_range(high)} of their attention"
    return f"{sentence}, {_layers(least).lower()} least, with {_range(low)} ({_WHEN[query]})."


def _horizon(profile: Profile) -> str:
    row = profile.horizon().set_index("query").loc["any"]
    if pd.isna(row["layer"]):
        table = profile.frames["mass"].query(
            "modality == 'vision' and query in ('text', 'last', 'generated')"
        )
        still = table.loc[table["layer"] == profile.layers - 1, "mean"].max()
        sure = "" if pd.isna(row["low"]) else f" (95% interval: layer {int(row['low'])} to none)"
        held = f"the last layer still gives vision {_percent(still)} of its attention"
        return f"There is no horizon{sure}: {held}."
    if row["layer"] == 0:
        return "No layer gives vision 1% of its attention: the model hardly looks at the image."
    low, high = ("none" if pd.isna(row[end]) else str(int(row[end])) for end in ("low", "high"))
    spread = f" (95% interval: {low} to {high})" if row["n"] > 1 and low != high else ""
    return (
        f"The horizon is layer {int(row['layer'])}{spread}: "
        "from there on vision gets less than 1% of the attention."
    )


def _tokens(profile: Profile) -> list[str]:
    query = answered(profile.frames)
    rows = _rows(profile.frames["coverage"], query=query, level=90)
    if rows.empty:
        return []
    share = _range(rows["mean"])
    return [
        f"90% of a head's attention on vision ({_WHEN[query]}) lies on {share} of the vision tokens"
        f"{_foremost(rows, '; {} needs the most', '; {} need the most')}."
    ]


def _heads(profile: Profile) -> list[str]:
    table = profile.frames["head_overlap"]
    query, when = ("step", "generated") if (table["query"] == "step").any() else ("last", "last")
    of_one_layer = table[(table["query"] == query) & (table["layer_a"] == table["layer_b"])]
    pairs = of_one_layer[(of_one_layer["head_b"] >= 0) & (of_one_layer["head_a"] != of_one_layer["head_b"])]
    if pairs.empty:
        return []
    top = _percent(profile.meta.settings.top_share)
    common = _percent(pairs["mean"].mean())
    shared = _percent(of_one_layer.loc[of_one_layer["head_b"] < 0, "mean"].mean())
    return [
        f"Two heads of a layer have {common} of their top {top} of the vision tokens in common "
        f"({_WHEN[when]}); a set of that size for the whole layer holds {shared} of a head's own."
    ]


def _drift(profile: Profile) -> list[str]:
    table = profile["drift"]
    if table.empty:
        return []
    lag = max(lag for lag in table["lag"].unique() if lag <= max(8, table["lag"].min()))
    rows = table[table["lag"] == lag]
    together = _percent(rows["mean"].mean())
    top = _percent(profile.meta.settings.top_share)
    before = "one step before" if lag == 1 else f"{lag} steps before"
    count = int(rows["n"].max())
    longer = "one longer answer" if count == 1 else f"the {count} longer answers"
    seen = "" if count == profile.meta.samples else f" (in {longer})"
    return [
        f"Of the {top} of the vision tokens that a step attends to most, {together} were "
        f"among them {before}{seen}: {_advice(table, count)}."
    ]


def _advice(drift: pd.DataFrame, count: int) -> str:
    """How often to refresh a core, where enough answers are long enough to tell."""
    if count >= ENOUGH:
        return f"refresh a core every {refresh_from_drift(drift[drift['n'] >= ENOUGH])} steps"
    few = "1 answer" if count == 1 else f"{count} answers"
    return f"{few}, too few to say how often to refresh a core ({ENOUGH - count} more of such length needed)"


def _window(profile: Profile) -> list[str]:
    curve = profile["window_curve"]
    query = answered(profile.frames)
    if not (curve["query"] == query).any():
        return []
    needs = pd.Series(windows_for(curve, 0.95, profile.layers))
    first = profile.meta.settings.text_sink
    sentence = (
        f"Beside the first {first} text tokens, 95% of the attention on text ({_WHEN[query]}) lies on the"
    )
    if needs.min() == needs.max():
        return [f"{sentence} newest {needs.max()} in every layer."]
    rows = _rows(profile["window"], query=query, level=95)
    furthest = _foremost(rows, "; {} reaches furthest", "; {} reach furthest")
    return [f"{sentence} newest {needs.min()} to {needs.max()}{furthest}."]


def _sink(profile: Profile) -> str:
    query = answered(profile.frames)
    rows = _rows(profile["sinks"], query=query, sink="first")
    return (
        f"The first token of the prompt takes {_range(rows['mean'])} of the attention ({_WHEN[query]})"
        f"{_foremost(rows, ', most in {}', ', most in {}')}."
    )


def _rows(table: pd.DataFrame, **where: object) -> pd.DataFrame:
    """`mean, low, high` by layer of the rows that match."""
    for name, value in where.items():
        table = table[table[name] == value]
    return table.set_index("layer")[["mean", "low", "high"]]


def _apart(rows: pd.DataFrame, first: Sequence[int], lowest: bool = False) -> list[int]:
    """The layers `first` and all that are not shown to lie below them (above them, with `lowest`).

    The interval of every layer that is left lies beyond those of all that are named. Without
    intervals, of a single sample, no layer is told from another.
    """
    layers = [int(layer) for layer in rows.index.to_numpy()]
    if rows["low"].isna().any():
        return layers
    names = set(first)
    while True:
        own = rows.loc[sorted(names)]
        near = rows["low"] <= own["high"].max() if lowest else rows["high"] >= own["low"].min()
        more = {layer for layer, meets in zip(layers, near, strict=True) if meets}
        if more <= names:
            return sorted(names)
        names |= more


def _first(values: pd.Series[float], place: int) -> int:
    """The layer at a place of the ascending order."""
    layers: list[int] = values.sort_values(kind="stable").index.to_list()
    return layers[place]


def _foremost(rows: pd.DataFrame, one: str, several: str) -> str:
    """The layers with the highest values, in these words, if they are told from any other; else empty."""
    most = _apart(rows, [_first(rows["mean"], -1)])
    if len(most) == len(rows):
        return ""
    return (one if len(most) == 1 else several).format(_layers(most).lower())


def _range(values: pd.Series[float]) -> str:
    low, high = _percent(values.min()), _percent(values.max())
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    """A share as a percentage of about two digits."""
    if 0.0 < share < 0.0005:
        return "less than 0.1%"
    return f"{100 * share:.1f}%" if 0.0 < share < 0.095 else f"{100 * share:.0f}%"


def _layers(numbers: Iterable[int]) -> str:
    """Ascending layers with runs drawn together: `Layers 0, 3-5`; `Layer 2` for one."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    text = ", ".join(named)
    return f"Layer {text}" if text.isdigit() else f"Layers {text}"
