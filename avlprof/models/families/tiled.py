"""InternVL and Aya Vision: the best fitting rows x columns of tiles, and then the whole picture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avlprof.models.adapter import Adapter
from avlprof.models.chat import check_equal_length
from avlprof.models.tiles import Layout, Tile
from avlprof.tasks.turn import Message


def tiled(rows: int, columns: int, side: int) -> Layout:
    """Tiles of a stretched picture row by row, `side` x `side` tokens each, and the whole behind them.

    A single tile is the whole picture itself.
    """
    boxes = [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    boxes += [(0.0, 0.0, 1.0, 1.0)] if len(boxes) > 1 else []
    each = side * side
    tiles = tuple(Tile(index * each, side, side, side, box) for index, box in enumerate(boxes))
    return Layout(len(tiles) * each, tiles)


def squares(frames: int, side: int) -> Layout | None:
    """A tile of `side` x `side` tokens for each frame of a video; None without frames."""
    tiles = tuple(Tile(at * side * side, side, side, side, frame=at) for at in range(frames))
    return Layout(frames * side * side, tiles) if tiles else None


def canvas(processor: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of tiles that a processor cuts a picture of this (width, height) into.

    By the function of the image processor's own module (GOT-OCR 2.0's, which both families use);
    None where it has none.
    """
    cutter = processor.image_processor
    options = _defaults(processor)
    if not options.get("crop_to_patches", getattr(cutter, "crop_to_patches", False)):
        return 1, 1
    choose = getattr(inspect.getmodule(type(cutter)), "get_optimal_tiled_canvas", None)
    if choose is None:
        return None
    least, most = (int(options.get(name, getattr(cutter, name))) for name in ("min_patches", "max_patches"))
    tile = (int(cutter.size["height"]), int(cutter.size["width"]))
    columns, rows = choose((size[1], size[0]), tile, least, most) if most > 1 else (1, 1)
    return int(rows), int(columns)


def _defaults(processor: Any) -> dict[str, Any]:
    """What the processor asks of its image processor unless told otherwise."""
    stated = getattr(processor, "images_kwargs", None)
    if stated is None:  # transformers before 5.24
        stated = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {}).get(
            "images_kwargs"
        )
    return dict(stated or {})


@dataclass(frozen=True)
class InternVLAdapter(Adapter):
    """Tiles of merged patches (arXiv 2404.16821); a frame of a video is one tile."""

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """Tiles and the whole picture; None without the picture's size or without a processor."""
        cut = None if size is None or self.processor is None else canvas(self.processor, size)
        return None if cut is None else tiled(*cut, self._side)

    def video_layout(self, encoding: Mapping[str, Tensor], video: int = 0, frames: int = 0) -> Layout | None:
        """One tile a frame."""
        return squares(frames, self._side)

    def check_together(self, chats: Sequence[Sequence[Message]]) -> None:
        """The processor stacks the videos of a batch."""
        check_equal_length(self.family, chats)

    @property
    def _side(self) -> int:
        return math.isqrt(int(self.model.config.image_seq_length))


@dataclass(frozen=True)
class AyaVisionAdapter(Adapter):
    """Tiles of merged patches, each behind a tag of its own (arXiv 2505.08751)."""

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """Tiles and the whole picture; None without the picture's size or without a processor."""
        cut = None if size is None or self.processor is None else canvas(self.processor, size)
        config = self.model.config
        patches = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        return None if cut is None else tiled(*cut, patches // int(config.downsample_factor))
