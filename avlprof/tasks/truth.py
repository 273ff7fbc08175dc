"""What each part of an embedded task's picture shows, by name: the truth that patches are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avlprof.tasks.pages.canvas import KINDS
from avlprof.tasks.pages.page import draw_page
from avlprof.tasks.pages.task import picture_of_page
from avlprof.tasks.pages.words import COLORS, KNOWN_WORDS, SHAPES
from avlprof.tasks.sample import Sample
from avlprof.tasks.shapes.scene import PATCH_SIZE, Item, Scene, patch_labels, render


@dataclass(frozen=True)
class Thing:
    """Something in a picture: its colour, and what it is called (`star`; `word`, and what is written)."""

    color: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """What the cells of a picture show: `cells [rows, columns]` int16, the number of a thing or -1."""

    cells: NDArray[np.int16]
    things: tuple[Thing, ...]


def truth_of(sample: Sample) -> tuple[Truth, ...]:
    """What each picture of a sample shows; empty unless all of them are an embedded task's."""
    if sample.turns or sample.videos:
        return ()
    found = [_known(source) for source in sample.images]
    truths = tuple(truth for truth in found if truth is not None)
    return truths if len(truths) == len(found) else ()


def _known(source: Any) -> Truth | None:
    if not isinstance(source, partial):
        return None
    readers: dict[Callable[..., Any], Callable[..., Truth]] = {
        render: scene_truth,
        picture_of_page: page_truth,
    }
    reader = readers.get(source.func)
    return None if reader is None else reader(*source.args)


def scene_truth(scene: Scene) -> Truth:
    """The items of a scene; a cell is a patch in which one has ink enough to be labelled."""
    rank = patch_labels(scene)[1][:, -1].reshape(-1, scene.frame.width // PATCH_SIZE)
    return Truth((rank - 1).astype(np.int16), tuple(map(_thing, scene.items)))


def _thing(item: Item) -> Thing:
    return Thing(item.color, (item.value,) if item.kind == "shape" else (item.kind, item.value))


def page_truth(seed: int, number: int) -> Truth:
    """Shapes, bars and words of a page; words that differ in colour or text are things of their own."""
    labels = draw_page(seed, number).labels
    words = {number: word for word, number in KNOWN_WORDS.items()}
    keys = np.stack([labels.kind, labels.color, labels.word], axis=-1).reshape(-1, 3)
    named = [_named(KINDS[kind], words.get(word, "")) for kind, _, word in keys.tolist()]
    keep = np.array(
        [bool(name) and color > 0 for name, (_, color, _) in zip(named, keys.tolist(), strict=True)]
    )
    distinct, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    place = {row: index for index, row in enumerate(_in_order(inverse[keep].tolist()))}
    cells = np.array([place.get(int(row), -1) for row in inverse.ravel()]).astype(np.int16)
    cells[~keep] = -1
    colors = (*COLORS, "white")
    things = [Thing(colors[int(distinct[row][1]) - 1], named[int(first[row])]) for row in place]
    return Truth(cells.reshape(labels.kind.shape), tuple(things))


def _in_order(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))


def _named(kind: str, word: str) -> tuple[str, ...]:
    """What a patch of a page shows is called; nothing for ground, lines, panels and unknown words."""
    if kind in SHAPES or kind == "bar":
        return (kind,)
    return (word,) if kind == "text" and word and not word.startswith("<") else ()
