"""One page of the picture world, from a seed and a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np
from PIL import Image

from avlprof.tasks.pages.canvas import SIDE, Canvas, PatchLabels
from avlprof.tasks.pages.charts import chart
from avlprof.tasks.pages.documents import document
from avlprof.tasks.pages.quiz import Question, Quiz
from avlprof.tasks.pages.scenes import scene
from avlprof.tasks.pages.tables import table

PAGES: Final[dict[str, Callable[[Random], tuple[Canvas, Quiz]]]] = {
    "scene": scene,
    "document": document,
    "chart": chart,
    "table": table,
}
"""What draws each kind of page and asks about it."""

_MIX = (*["scene"] * 3, *["document"] * 3, *["chart"] * 2, *["table"] * 2)
_FLAT = 12  # so many colours,
_FLAT_SHARE = 0.85  # and how much of a drawn page they cover at least


@dataclass(frozen=True)
class Page:
    """A picture, the questions about it, and what each of its patches shows."""

    kind: str
    image: Image.Image
    questions: tuple[Question, ...]
    labels: PatchLabels


def draw_page(seed: int, number: int) -> Page:
    """Page `number` of a seed: always the same, and another than that of any other seed or number."""
    rng = Random(seed * 1_000_003 + number)
    kind = rng.choice(_MIX)
    canvas, quiz = PAGES[kind](rng)
    return Page(kind, canvas.image, tuple(quiz.questions), canvas.labels)


def is_page(picture: Image.Image) -> bool:
    """Whether a picture looks like one of `draw_page`: of their size, and mostly of a few flat colours.

    Photographs have thousands of colours. A drawing of that size by another hand may pass.
    """
    if picture.size != (SIDE, SIDE):
        return False
    pixels = np.asarray(picture.convert("RGB")).astype(np.uint32)
    codes = (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
    counts = np.sort(np.unique(codes, return_counts=True)[1])
    return bool(counts[-_FLAT:].sum() >= _FLAT_SHARE * codes.size)
