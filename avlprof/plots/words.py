"""Where the model looks while it writes each word."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from avlprof.errors import UserError
from avlprof.plots.pictures import (
    Caption,
    HeatInfo,
    Pictures,
    Tiles,
    counted,
    draw_heatmaps,
    heat_info,
    heat_panel,
    seen_pictures,
)

PANELS = 23
"""Most words in one figure; with the picture itself that is 24 panels."""
SPECIAL = re.compile(r"</?[\w|▁\uff5c-]+>|\[(SEP|EOS|PAD|END)\]")
"""Tokens that end an answer and are no words, as tokenizers write them: `</s>`, `<|im_end|>`, `[SEP]`."""
ROWS = "the rows that write each word"


def group_words(pieces: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Words, and for each the positions of its tokens.

    A word begins where a token begins with a space or with a tokenizer's mark of one (`Ġ`, `▁`).
    Special tokens that end the answer are left out.

    Args:
        pieces: tokens as `tokenizer.convert_ids_to_tokens` gives them.
    """
    words: list[str] = []
    pieces = list(pieces)
    while pieces and SPECIAL.fullmatch(pieces[-1]):
        pieces.pop()
    positions: list[list[int]] = []
    for position, piece in enumerate(pieces):
        text = piece.lstrip(" \n\tĠ▁Ċ")
        if not words or text != piece:
            words.append("")
            positions.append([])
        words[-1] += text
        positions[-1].append(position)
    return words, positions


def word_heatmaps_info(
    pictures: Pictures,
    scores: ArrayLike,
    tiles: Tiles,
    words: Sequence[str],
    layer: int | None = None,
    steps: Sequence[Sequence[int]] | None = None,
    caption: Caption | None = None,
) -> HeatInfo:
    """One overlay a word.

    Args:
        pictures: what the model saw, one or several.
        scores: `[steps, layers, vision]`; the row of a step is that of the token fed in, which
            writes the *next* one. The first token is written by the prompt's last row, so put
            that before the `decode` scores of a run to have a row for every generated token.
        tiles: where the vision tokens lie in each picture.
        words: a label per word, of the whole answer: the first 23 are drawn, and of how many is said.
        layer: which layer; None is the mean of all.
        steps: for each word the steps that wrote it (their mean is drawn); None: one step a word.
        caption: sample and prompt; which rows are drawn is said in any case.

    Raises:
        UserError: as `vision_heatmap_info`, a step or layer that does not exist, or labels and
            steps of different number.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 3:
        raise UserError(f"scores must be [steps, layers, vision], got {table.ndim} dimensions")
    seen, own = seen_pictures(pictures, tiles, table.shape[2])
    count, depth = table.shape[:2]
    if layer is not None and not 0 <= layer < depth:
        raise UserError(f"layer must be in 0 to {depth - 1}, got {layer}")
    groups = [[step] for step in range(count)] if steps is None else [list(group) for group in steps]
    if len(groups) != len(words) or not words:
        kind = "scored steps" if steps is None else "groups of steps"
        raise UserError(f"words must have one label for each of the {len(groups)} {kind}, got {len(words)}")
    wrong = next((step for group in groups for step in group if not 0 <= step < count), None)
    if wrong is not None or not all(groups):
        raise UserError(f"steps must name at least one step in 0 to {count - 1} a word, got {wrong}")
    chosen = table.mean(axis=1) if layer is None else table[:, layer]
    panels = tuple(
        heat_panel(f"“{word}”", chosen[group].mean(axis=0), own)
        for word, group in zip(words[:PANELS], groups, strict=False)
    )
    where = f"mean of {depth} layers" if layer is None else f"layer {layer}"
    where = f"{where} and of a word's tokens" if any(len(group) > 1 for group in groups) else where
    note = f"{_count(len(words), groups, count)}; {where}"
    subtitle = (caption or Caption()).words(ROWS)
    title = "Where the model looks as it writes"
    return heat_info(title, seen, panels, table.shape[2], note, subtitle=subtitle)


def _count(words: int, groups: Sequence[Sequence[int]], steps: int) -> str:
    """How much of the answer is drawn, also when only its first words were handed over.

    One step behind the last word is that of the end token.
    """
    behind = steps - 1 - max(step for group in groups for step in group)
    if words <= PANELS and behind > 1:
        return f"first {words} words, {behind} more tokens of the answer are not drawn"
    return counted(min(words, PANELS), words, "word", "first")


def word_heatmaps(
    pictures: Pictures,
    scores: ArrayLike,
    tiles: Tiles,
    words: Sequence[str],
    layer: int | None = None,
    steps: Sequence[Sequence[int]] | None = None,
    caption: Caption | None = None,
) -> Figure:
    """The pictures under the attention of each generated word (see `word_heatmaps_info`)."""
    return draw_heatmaps(word_heatmaps_info(pictures, scores, tiles, words, layer, steps, caption))
