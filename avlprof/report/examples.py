"""Traced samples with their pictures, and where the model looked in them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from avlprof.errors import UserError
from avlprof.models.tiles import parse_tiles
from avlprof.plots import Caption, vision_heatmap
from avlprof.report.figures import Embedded, as_png
from avlprof.run import Run
from avlprof.tasks import Task

LONGEST = 600
"""Characters of a prompt or answer that are shown."""


@dataclass(frozen=True)
class Example:
    """One sample: what was asked, answered and expected, and its heatmap."""

    sample: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    figure: Embedded


def examples(run: Run, count: int, task: Task | None = None) -> tuple[tuple[Example, ...], str]:
    """Heatmaps of `count` samples, of as many groups as there are, and a note on what is missing.

    A figure shows the attention of the last prompt row, a panel a layer.
    """
    if count <= 0:
        return (), "None was asked for."
    rows = [row for row in run.samples().to_dict("records") if row["tiles"] != "[]"]
    if not rows:
        return (
            (),
            "There is none: the places of these samples' vision tokens in their pictures are not known.",
        )
    drawn: list[Example] = []
    reason = ""
    for row in _spread(rows, count):
        try:
            drawn.append(_example(run, row, task))
        except UserError as error:
            reason = f"A picture is missing: {error}."
    return tuple(drawn), reason


def _spread(rows: list[dict[Hashable, Any]], count: int) -> list[dict[Hashable, Any]]:
    """The first sample of every group in turn, then the second ones, up to `count`."""
    turns: dict[str, int] = {}
    ranked = []
    for index, row in enumerate(rows):
        group = str(row["group"])
        turns[group] = turns.get(group, -1) + 1
        ranked.append((turns[group], index))
    return [rows[index] for _, index in sorted(ranked)[:count]]


def _example(run: Run, row: dict[Hashable, Any], task: Task | None) -> Example:
    sample = str(row["sample"])
    tiles = parse_tiles(row["tiles"])
    scores = run.scores(sample, ["last"])["last"]
    caption = Caption(sample, str(row["prompt"]), "the last prompt token")
    figure = vision_heatmap(run.pictures(sample, task), scores, tiles, caption=caption)
    references = tuple(_short(str(text)) for text in row["references"])
    return Example(sample, _short(str(row["prompt"])), _short(str(row["answer"])), references, as_png(figure))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
