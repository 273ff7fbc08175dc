"""How often vision tokens name what they show: words of a lens held to the truth, or to answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from avlprof.analysis.intervals import over_samples
from avlprof.models.tiles import Tile, parse_tiles
from avlprof.tasks.truth import Thing, Truth

MEASURES: Final = ("thing", "color", "object", "answer")
"""What a word is held to: the thing in the patch, its colour or its name, a word of the sample's answer."""
COLUMNS: Final = ("sample", "layer", "measure", "own", "other")
Text = Callable[[int], str]
"""From a token id to its text."""


@dataclass(frozen=True)
class SampleLens:
    """What the vision tokens of one sample say.

    `ids` int32 and `shares` fp32 `[layers, vision, top]` are the likeliest tokens and their
    probabilities, best first. `truth` is what each picture shows, where that is known.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    tiles: str
    ids: NDArray[np.int32]
    shares: NDArray[np.float32]
    truth: tuple[Truth, ...] = ()

    def pictures(self) -> tuple[tuple[Tile, ...], ...]:
        """Where the vision tokens lie in each picture; empty where that is not known."""
        return parse_tiles(self.tiles)

    def things(self) -> tuple[NDArray[np.int64], tuple[Thing, ...]]:
        """The thing that fills most of each token's place, by number `[vision]`, -1 for none; the things."""
        found = np.full(self.ids.shape[1], -1, dtype=np.int64)
        things: list[Thing] = []
        for tiles, truth in zip(self.pictures(), self.truth, strict=False):
            for tile in tiles:
                numbers = _filled(tile, truth)
                found[tile.tokens()] = np.where(numbers < 0, -1, numbers + len(things))
            things += truth.things
        return found, tuple(things)


def named(samples: Sequence[SampleLens], layers: Sequence[int], text: Text) -> pd.DataFrame:
    """How often the likeliest word is the right one: a row a sample, layer and measure.

    `own` is the share of tokens whose word names what is in their place (measures `thing`, `color`,
    `object`: of tokens in which something is) or is a word of the sample's reference answers
    (`answer`: of all tokens); `other` is the same share for what stands elsewhere in the picture, or
    for the answers to other samples: what chance and favourite words give. Samples that have no other
    are left out.
    """
    rows = [row for one in samples for row in _by_cell(one, layers, text)]
    rows += _by_answer(samples, layers, text)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def by_layer(samples: Sequence[SampleLens], layers: Sequence[int], text: Text) -> pd.DataFrame:
    """Means over samples with 95% intervals: `layer, measure, what, mean, low, high, n`.

    `what` is `own`, `other` or `difference` of the measures of `named`, the difference paired by
    sample; measure `share` is the probability of the likeliest word, and `settled` the share of
    tokens whose likeliest word is that behind the last layer.
    """
    table = named(samples, layers, text)
    table["difference"] = table["own"] - table["other"]
    long = table.melt(["sample", "layer", "measure"], var_name="what", value_name="value")
    whole = pd.concat([long, pd.DataFrame(list(_plain(samples, layers)))], ignore_index=True)
    frame = over_samples(whole, ["measure", "what", "layer"], "value")
    return frame[["layer", "measure", "what", "mean", "low", "high", "n"]]


def sentences(frame: pd.DataFrame) -> list[str]:
    """What rows of `by_layer` say: behind which layers tokens name what they show.

    A layer is named where the difference to chance is sure among as many layers as there are.
    """
    measured = [measure for measure in MEASURES if measure in set(frame["measure"])]
    if not measured:
        return [NOTHING_TO_HOLD]
    chosen = measured[:1] + [one for one in measured if one == "answer" and one != measured[0]]
    return [_finding(frame[frame["measure"] == measure], measure) for measure in chosen]


def _by_cell(one: SampleLens, layers: Sequence[int], text: Text) -> Iterator[tuple[Any, ...]]:
    place, things = one.things()
    filled = np.flatnonzero(place >= 0)
    present = np.unique(place[filled])
    if len(present) < 2:
        return
    own = (place[filled][:, None] == present[None]).astype(float)
    for measure in MEASURES[:3]:
        for layer, ids in zip(layers, one.ids[:, filled, 0], strict=True):
            unique, inverse = np.unique(ids, return_inverse=True)
            says = np.array([[names(text(i), things[t], measure) for t in present] for i in unique.tolist()])
            hits = says.astype(float)[inverse]
            elsewhere = ((1 - own) * hits).sum(axis=1) / (len(present) - 1)
            yield one.id, layer, measure, float((own * hits).sum(axis=1).mean()), float(elsewhere.mean())


def _by_answer(samples: Sequence[SampleLens], layers: Sequence[int], text: Text) -> list[tuple[Any, ...]]:
    asked = [one for one in samples if one.ids.shape[1] and _spoken(one.references)]
    if len(asked) < 2:
        return []
    answers = [_spoken(one.references) for one in asked]
    rows: list[tuple[Any, ...]] = []
    for index, one in enumerate(asked):
        for layer, ids in zip(layers, one.ids[:, :, 0], strict=True):
            unique, counts = np.unique(ids, return_counts=True)
            said = [text(token).strip().lower() for token in unique.tolist()]
            hits = [
                float(counts @ np.array([word in answer for word in said])) / counts.sum()
                for answer in answers
            ]
            own, others = hits[index], float(np.mean(hits[:index] + hits[index + 1 :]))
            rows.append((one.id, layer, "answer", own, others))
    return rows


def _plain(samples: Sequence[SampleLens], layers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for one in samples:
        if not one.ids.shape[1]:
            continue
        for index, layer in enumerate(layers):
            key = {"sample": one.id, "layer": layer, "what": "own"}
            yield key | {"measure": "share", "value": float(one.shares[index, :, 0].mean())}
            settled = float((one.ids[index, :, 0] == one.ids[-1, :, 0]).mean())
            yield key | {"measure": "settled", "value": settled}


NOTHING_TO_HOLD: Final = (
    "nothing is known that the words could be held to: neither what the patches show (embedded tasks) nor "
    "reference answers of two samples"
)
_NAMED: Final = {
    "thing": ("name what they show", "what stands elsewhere in the picture"),
    "answer": ("say a word of the answer", "a word of other samples' answers"),
}


def _finding(frame: pd.DataFrame, measure: str) -> str:
    """One sentence on a measure's rows of `by_layer`."""
    table = {what: own.set_index("layer") for what, own in frame.groupby("what")}
    difference, own, other = (table[what] for what in ("difference", "own", "other"))
    verb, rest = _NAMED.get(measure, _NAMED["thing"])
    best = int(difference.index[int(difference["mean"].argmax())])
    mine, theirs = (float(np.asarray(table["mean"].loc[best])) for table in (own, other))
    figures = f"{mine:.1%} of patches, against {theirs:.1%} for {rest}"
    sure = [int(layer) for layer in difference.index[_surely_above(difference)]]
    if not difference["low"].notna().any():
        return f"One sample tells no interval: patches {verb} most behind layer {best}, {figures}."
    if not sure:
        return f"Behind no layer do patches {verb} more than by chance; most behind layer {best}: {figures}."
    return (
        f"Patches {verb} behind {_ranges(sure, list(difference.index))}, most behind layer {best}: {figures}."
    )


def _surely_above(difference: pd.DataFrame) -> NDArray[np.bool_]:
    """Which means are above 0, all at once: 95% intervals as wide as so many layers take (Bonferroni)."""
    freedom = np.maximum(difference["n"].to_numpy(dtype=float) - 1, 1)
    wider = stdtrit(freedom, 1 - 0.025 / len(difference)) / stdtrit(freedom, 0.975)
    low = difference["mean"] - (difference["mean"] - difference["low"]) * wider
    return np.asarray(low > 0, dtype=bool)


def _ranges(layers: Sequence[int], known: Sequence[int]) -> str:
    """`layers 3 to 7 and 9`, of layers that follow each other among those that are known."""
    place = {layer: index for index, layer in enumerate(known)}
    runs: list[list[int]] = []
    for layer in layers:
        if runs and place[layer] == place[runs[-1][-1]] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    noun = "layer" if len(layers) == 1 else "layers"
    return f"{noun} {parts[0]}" if len(parts) == 1 else f"{noun} {', '.join(parts[:-1])} and {parts[-1]}"


def names(word: str, thing: Thing, measure: str = "thing") -> bool:
    """Whether a token's text names a thing: it is its colour, one of its names, or a piece of a name.

    Case does not count, nor blanks. A piece counts from three letters on, or where the name is spelled
    with as few; what is written in capitals or digits is named by single ones too.
    """
    text = word.strip().lower()
    if not text:
        return False
    color = text == thing.color.lower()
    object_ = any(_piece(text, name) for name in thing.names)
    return {"thing": color or object_, "color": color, "object": object_}[measure]


def _piece(text: str, name: str) -> bool:
    whole = name.lower()
    return text == whole or (text in whole and (len(text) >= 3 or name.upper() == name))


def _spoken(references: Iterable[str]) -> frozenset[str]:
    """Words of reference answers, without case and punctuation."""
    words = (word.strip(".,:;!?()\"'").lower() for text in references for word in text.split())
    return frozenset(word for word in words if word)


def _filled(tile: Tile, truth: Truth) -> NDArray[np.int64]:
    """The thing that fills at least half of each token's place `[rows, columns]`, -1 where none does."""
    rows, columns = truth.cells.shape
    left, top, right, bottom = tile.box
    down = _overlap(np.linspace(top, bottom, tile.rows + 1), rows)
    along = _overlap(np.linspace(left, right, tile.columns + 1), columns)
    if not truth.things:
        return np.full((tile.rows, tile.columns), -1, dtype=np.int64)
    areas = np.stack([down @ (truth.cells == number) @ along.T for number in range(len(truth.things))])
    return np.where(areas.max(axis=0) >= 0.5 - 1e-9, areas.argmax(axis=0), -1)


def _overlap(edges: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """Share of each token's side in each of `cells` equal parts of the picture, `[tokens, cells]`."""
    walls = np.linspace(0.0, 1.0, cells + 1)
    shared = np.minimum(edges[1:, None], walls[None, 1:]) - np.maximum(edges[:-1, None], walls[None, :-1])
    return shared.clip(min=0.0) / np.diff(edges)[:, None]
