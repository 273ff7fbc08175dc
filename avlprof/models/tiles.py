"""Where vision tokens lie in a picture: grids of tokens over boxes of it, and painting by them.

Numbers alone, no torch: figures use it too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avlprof.errors import UserError

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FINEST = 256
"""Most cells along a side of a painted picture."""


@dataclass(frozen=True)
class Tile:
    """A grid of vision tokens over a part of a picture.

    Token (row, column) is vision token `first + row * stride + column`; a stride above `columns`
    leaves room for tokens at the end of a row that are no patch (newlines). `box` is left, top,
    right, bottom in shares of the picture's width and height; it may reach beyond 0 and 1, where
    a picture was padded. `frame` is the first frame that the tile shows, 0 for a still picture.
    """

    first: int
    rows: int
    columns: int
    stride: int
    box: Box = WHOLE
    frame: int = 0

    def tokens(self) -> NDArray[np.int64]:
        """Indices of its patches, `[rows, columns]`."""
        positions: NDArray[np.int64] = np.arange(self.rows)[:, None] * self.stride + np.arange(self.columns)
        return self.first + positions

    def behind(self, tokens: int) -> Tile:
        """The same tile with so many vision tokens before it."""
        return replace(self, first=self.first + tokens)


@dataclass(frozen=True)
class Layout:
    """All vision tokens of one picture or video: how many, and the tiles that its patches form."""

    tokens: int
    tiles: tuple[Tile, ...]


def grid(rows: int, columns: int, box: Box = WHOLE) -> Layout:
    """One grid of tokens, row after row."""
    return Layout(rows * columns, (Tile(0, rows, columns, columns, box),))


def paint(tiles: Sequence[Tile], scores: ArrayLike, rows: int, columns: int) -> NDArray[np.float64]:
    """What the cells of a picture get when each token spreads its score evenly over its own place.

    The part of a token's place that lies outside the picture gets nothing, so the sum over the
    cells is the sum over the tiles' tokens. Tokens of no tile (newlines) are left out.

    Args:
        tiles: those of one picture; where they overlap, their scores add up.
        scores: `[vision]` of the prompt that the tiles count in.
        rows, columns: cells of the result.

    Returns:
        fp64 `[rows, columns]`.
    """
    flat = np.asarray(scores, dtype=float)
    painted = np.zeros((rows, columns))
    for tile in tiles:
        left, top, right, bottom = tile.box
        down = _spread(top, bottom, tile.rows, rows)
        along = _spread(left, right, tile.columns, columns)
        painted += down.T @ flat[tile.tokens()] @ along
    return painted


def resolution(tiles: Sequence[Tile]) -> tuple[int, int]:
    """Rows and columns of cells at which a picture's finest tile is painted cell by cell."""
    down = max(tile.rows / (tile.box[3] - tile.box[1]) for tile in tiles)
    along = max(tile.columns / (tile.box[2] - tile.box[0]) for tile in tiles)
    return min(max(round(down), 1), FINEST), min(max(round(along), 1), FINEST)


def dump_tiles(pictures: Sequence[Sequence[Tile]]) -> str:
    """JSON of the tiles of each picture: `[first, rows, columns, stride, left, top, right, bottom]`."""
    listed = [
        [[t.first, t.rows, t.columns, t.stride, *(round(x, 6) for x in t.box)] for t in picture]
        for picture in pictures
    ]
    return json.dumps(listed, separators=(",", ":"))


def parse_tiles(text: str) -> tuple[tuple[Tile, ...], ...]:
    """The tiles of each picture, from what `dump_tiles` wrote.

    Raises:
        UserError: the text is something else.
    """
    try:
        return tuple(tuple(_tile(entry) for entry in picture) for picture in json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"tiles must be lists of eight numbers a tile, got {text[:60]!r} ({error})") from None


def _tile(entry: list[Any]) -> Tile:
    first, rows, columns, stride, left, top, right, bottom = entry
    tile = Tile(first, rows, columns, stride, (left, top, right, bottom))
    if not all(isinstance(number, int | float) for number in (*astuple(tile)[:4], *tile.box)):
        raise TypeError("not a number")
    return tile


def _spread(start: float, end: float, tokens: int, cells: int) -> NDArray[np.float64]:
    """Share of each token along one axis that each cell gets, `[tokens, cells]`; its rows sum to 1."""
    edges = np.linspace(start, end, tokens + 1)
    walls = np.linspace(0.0, 1.0, cells + 1)
    overlap = np.minimum(edges[1:, None], walls[None, 1:]) - np.maximum(edges[:-1, None], walls[None, :-1])
    overlap = overlap.clip(min=0.0)
    total = overlap.sum(axis=1, keepdims=True)
    outside = total[:, 0] < 1e-9  # a token of padding alone: its score belongs to the nearest edge
    nearest = np.where(edges[1:] <= 0.5, 0, cells - 1)
    overlap[outside] = 0.0
    overlap[outside, nearest[outside]] = 1.0
    shares: NDArray[np.float64] = overlap / np.where(outside[:, None], 1.0, total)
    return shares


def owners(tiles: Sequence[Tile], rows: int, columns: int) -> NDArray[np.int64]:
    """The token that shows each cell of a picture in most detail, `[rows, columns]`; -1 where none does.

    A cell belongs to the tokens whose place holds its middle; of those of several tiles the smallest counts.
    """
    found = np.full((rows, columns), -1, dtype=np.int64)
    finest = np.full((rows, columns), np.inf)
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    for tile in tiles:
        left, top, right, bottom = tile.box
        down = np.floor((y - top) / (bottom - top) * tile.rows).astype(int)
        along = np.floor((x - left) / (right - left) * tile.columns).astype(int)
        inside = np.outer((down >= 0) & (down < tile.rows), (along >= 0) & (along < tile.columns))
        size = (bottom - top) * (right - left) / (tile.rows * tile.columns)
        tokens = tile.tokens()[down.clip(0, tile.rows - 1)[:, None], along.clip(0, tile.columns - 1)]
        taken = inside & (size < finest)
        found[taken], finest[taken] = tokens[taken], size
    return found
