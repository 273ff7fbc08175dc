"""What a profile says, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from avlprof.analysis.profile import answered
from avlprof.analysis.tables import refresh_from_drift
from avlprof.analysis.window import windows_for

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

_WHEN = {"generated": "while decoding", "last": "in the last prompt row"}


def findings(profile: Profile) -> list[str]:
    """What was found, one sentence each: where the model looks at the image and what text it needs.

    Sentences are about decoding steps, or about the last prompt row in a run without decoding.
    Layers count from 0. What a run does not show is left out.
    """
    if profile.frames["coverage_curve"].empty:
        sentences = ["No sample has vision tokens, so there is nothing to say about vision."]
    else:
        sentences = [
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
    if profile.meta.samples < 8:
        few = "1 sample" if profile.meta.samples == 1 else f"{profile.meta.samples} samples"
        sentences.append(f"All of this rests on {few}: trace more before you rely on it.")
    return sentences


def _looking(profile: Profile) -> str:
    query = answered(profile.frames)
    mass = _means(profile.frames["mass"], query=query, modality="vision")
    if mass.max() <= 0.0:
        return f"No layer looks at the image {_WHEN[query]}."
    mainly = mass[mass >= mass.max() / 2]
    if len(mainly) == 1:
        sentence = (
            f"Layer {mass.idxmax()} looks at the image most, with {_percent(mass.max())} of its attention"
        )
    else:
        sentence = f"{_layers(mainly.index)} look at the image most, with {_range(mainly)} of their attention"
    if len(mainly) < len(mass):
        sentence += f", layer {mass.idxmin()} least, with {_percent(mass.min())}"
    return f"{sentence} ({_WHEN[query]})."


def _horizon(profile: Profile) -> str:
    row = profile.horizon().set_index("query").loc["any"]
    if pd.isna(row["layer"]):
        table = profile.frames["mass"].query(
            "modality == 'vision' and query in ('text', 'last', 'generated')"
        )
        still = table.loc[table["layer"] == profile.layers - 1, "mean"].max()
        return f"There is no horizon: the last layer still gives vision {_percent(still)} of its attention."
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
    share = _means(profile.frames["coverage"], query=query, level=90)
    if share.empty:
        return []
    return [
        f"90% of a head's attention on vision ({_WHEN[query]}) lies on {_range(share)} of the vision tokens; "
        f"layer {share.idxmax()} needs the most."
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
    seen = "" if rows["n"].max() == profile.meta.samples else f" (in the {rows['n'].max()} longer answers)"
    return [
        f"Of the {top} of the vision tokens that a step attends to most, {together} were "
        f"among them {before}{seen}: refresh a core every {refresh_from_drift(table)} steps."
    ]


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
    return [f"{sentence} newest {needs.min()} to {needs.max()}; layer {needs.idxmax()} reaches furthest."]


def _sink(profile: Profile) -> str:
    query = answered(profile.frames)
    first = _means(profile["sinks"], query=query, sink="first")
    return (
        f"The first token of the prompt takes {_range(first)} of the attention ({_WHEN[query]}), "
        f"most in layer {first.idxmax()}."
    )


def _means(table: pd.DataFrame, **where: object) -> pd.Series[float]:
    """Means by layer of the rows that match."""
    for name, value in where.items():
        table = table[table[name] == value]
    return table.set_index("layer")["mean"]


def _range(values: pd.Series[float]) -> str:
    low, high = _percent(values.min()), _percent(values.max())
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    """A share as a percentage of about two digits."""
    if 0.0 < share < 0.0005:
        return "less than 0.1%"
    return f"{100 * share:.1f}%" if 0.0 < share < 0.095 else f"{100 * share:.0f}%"


def _layers(numbers: Iterable[int]) -> str:
    """Ascending layers with runs drawn together: `Layers 0, 3-5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"Layers {', '.join(named)}"
