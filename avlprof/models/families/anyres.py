"""LLaVA-NeXT and LLaVA-OneVision: an overview of the picture, then a fine grid with newlines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import unpad_image

from avlprof.models.adapter import Adapter
from avlprof.models.chat import check_equal_length
from avlprof.models.families._boxes import padded_box
from avlprof.models.tiles import Box, Layout, Tile
from avlprof.tasks.turn import Message


@dataclass(frozen=True)
class LlavaNextAdapter(Adapter):
    """Tiles of the best fitting resolution, their padding cut off, a newline token behind each row.

    Source: LLaVA-NeXT (2024-01-30); the library's own functions choose and cut.
    """

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """Overview and fine grid, from `image_sizes` (int64 [images, 2], height and width)."""
        sizes = encoding.get("image_sizes")
        if sizes is None or image >= len(sizes):
            return None
        side = self._side
        height, width = (int(pixels) for pixels in sizes[image])
        rows, columns, box = self._fine((height, width))
        overview = Tile(0, side, side, side)
        fine = Tile(side * side, rows, columns, columns + 1, box)
        return Layout(side * side + rows * (columns + 1), (overview, fine))

    @property
    def _side(self) -> int:
        """Patches along a side of a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def _fine(self, size: tuple[int, int]) -> tuple[int, int, Box]:
        """Rows and columns of the fine grid of a picture of (height, width), and where it lies."""
        config = self.model.config
        tile, side = int(config.vision_config.image_size), self._side
        canvas = select_best_resolution(size, config.image_grid_pinpoints)
        down, along = (length // tile * side for length in canvas)
        kept = unpad_image(torch.arange(down * along).view(1, down, along), size)[0]
        rows, columns = kept.shape
        top, left = divmod(int(kept[0, 0]), along)
        empty = np.broadcast_to(np.uint8(0), (3, *size))
        drawn = get_patch_output_size(empty, canvas, input_data_format=ChannelDimension.FIRST)
        pasted = [(all_of_it - part) // 2 for all_of_it, part in zip(canvas, drawn, strict=True)]
        pitch = tile / side

        def share(token: int, axis: int) -> float:
            return float((token * pitch - pasted[axis]) / drawn[axis])

        box = (share(left, 1), share(top, 0), share(left + columns, 1), share(top + rows, 0))
        return rows, columns, box


@dataclass(frozen=True)
class LlavaOnevisionAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT, the fine grid shrunk where it is large (arXiv 2408.03326).

    A prompt of several pictures has the overviews alone, padded to squares; a video has pooled
    frames. Either ends in one newline token.
    """

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """Overview and fine grid, or the overview alone beside other pictures (`batch_num_images`)."""
        sizes, together = encoding.get("image_sizes"), encoding.get("batch_num_images")
        if sizes is None or image >= len(sizes):
            return None
        counts = [1] * len(sizes) if together is None else [int(n) for n in together for _ in range(int(n))]
        if counts[image] == 1:
            return super().image_layout(encoding, image, size)
        side = self._side
        height, width = (int(pixels) for pixels in sizes[image])
        return Layout(side * side + 1, (Tile(0, side, side, side, padded_box((width, height))),))

    def video_layout(self, encoding: Mapping[str, Tensor], video: int = 0, frames: int = 0) -> Layout | None:
        """A pooled square a frame, from `pixel_values_videos` [videos, frames, 3, height, width]."""
        pixels = encoding.get("pixel_values_videos")
        if pixels is None or video >= len(pixels):
            return None
        side = math.ceil(self._side / 2)
        tiles = [Tile(at * side * side, side, side, side, frame=at) for at in range(pixels.shape[1])]
        return Layout(len(tiles) * side * side + 1, tuple(tiles))

    def check_together(self, chats: Sequence[Sequence[Message]]) -> None:
        """The processor stacks the videos of a batch."""
        check_equal_length(self.family, chats)

    def _fine(self, size: tuple[int, int]) -> tuple[int, int, Box]:
        rows, columns, box = super()._fine(size)
        most = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self._side**2))
        return (int(rows // ratio), int(columns // ratio), box) if ratio > 1.1 else (rows, columns, box)
