"""Questions about a scene, with their one right answer.

Every question type is a small function from a scene to a question and its answer, or to
`None` where the scene does not allow an unambiguous one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from avlprof.tasks.shapes.scene import CELLS, COLORS, Item, Scene

Question = tuple[str, str]
ROWS = ("top", "middle", "bottom")


def _pick(items: list[Item], rng: np.random.Generator) -> Item | None:
    return items[int(rng.integers(len(items)))] if items else None


def _alone(scene: Scene, same: Callable[[Item], object], among: Callable[[Item], bool]) -> list[Item]:
    """The items of a kind that no other item of it resembles under `same`."""
    pool = [item for item in scene.items if among(item)]
    return [item for item in pool if sum(same(other) == same(item) for other in pool) == 1]


def _is_shape(item: Item) -> bool:
    return item.kind == "shape"


def _is_text(item: Item) -> bool:
    return item.kind != "shape"


def describe(scene: Scene, rng: np.random.Generator) -> Question | None:
    parts = [f"{item.name} at {CELLS[item.cell]}" for item in scene.items]
    return "describe the image.", ", ".join(parts)


def read(scene: Scene, rng: np.random.Generator) -> Question | None:
    texts = [item.value for item in scene.items if _is_text(item)]
    return ("read all the text.", ", ".join(texts)) if texts else None


def colors(scene: Scene, rng: np.random.Generator) -> Question | None:
    return "list the colors.", ", ".join(item.color for item in scene.items)


def row(scene: Scene, rng: np.random.Generator) -> Question | None:
    held = sorted({item.cell // 3 for item in scene.items})
    chosen = held[int(rng.integers(len(held)))]
    names = [item.name for item in scene.items if item.cell // 3 == chosen]
    return f"what is in the {ROWS[chosen]} row?", ", ".join(names)


def position(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(list(scene.items), rng)
    return (f"what is at the {CELLS[item.cell]}?", item.name) if item else None


def where(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(_alone(scene, lambda i: i.name, lambda i: True), rng)
    return (f"where is the {item.name}?", CELLS[item.cell]) if item else None


def color(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(_alone(scene, lambda i: i.value, _is_shape), rng)
    return (f"what color is the {item.value}?", item.color) if item else None


def text_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(_alone(scene, lambda i: i.value, _is_text), rng)
    return (f"what color is the {item.kind} {item.value}?", item.color) if item else None


def shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(_alone(scene, lambda i: i.color, _is_shape), rng)
    return (f"what shape is {item.color}?", item.value) if item else None


def text(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _pick(_alone(scene, lambda i: i.color, _is_text), rng)
    return (f"what text is {item.color}?", item.value) if item else None


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    return "how many objects are there?", str(len(scene.items))


def exists(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = sorted({item.color for item in scene.items})
    absent = sorted(set(COLORS) - set(present))
    pool, answer = (present, "yes") if rng.random() < 0.5 or not absent else (absent, "no")
    return f"is there a {pool[int(rng.integers(len(pool)))]} object?", answer


QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    ask.__name__: ask
    for ask in (describe, read, colors, row, position, where, color, text_color, shape, text, count, exists)
}
