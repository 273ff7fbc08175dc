"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V: every image and video has a grid of its own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter
from avlprof.models.chat import check_apart
from avlprof.models.tiles import Layout, Tile
from avlprof.tasks.turn import Message


@dataclass(frozen=True)
class QwenVLAdapter(Adapter):
    """Native resolution; squares of merged patches become one token (arXiv 2409.12191, 2507.01006)."""

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """The merged grid of one image, from `image_grid_thw` (int64 [images, 3], in patches)."""
        return self._layout(encoding.get("image_grid_thw"), image)

    def video_layout(self, encoding: Mapping[str, Tensor], video: int = 0, frames: int = 0) -> Layout | None:
        """A merged grid for every two frames, from `video_grid_thw`; the first of them has it."""
        return self._layout(encoding.get("video_grid_thw"), video)

    def _layout(self, grids: Tensor | None, index: int) -> Layout | None:
        if grids is None or index >= len(grids):
            return None
        config = self.model.config.vision_config
        merge, together = int(config.spatial_merge_size), int(config.temporal_patch_size)
        times, rows, columns = (int(size) for size in grids[index])
        rows, columns = rows // merge, columns // merge
        tiles = [
            Tile(time * rows * columns, rows, columns, columns, frame=time * together)
            for time in range(times)
        ]
        return Layout(times * rows * columns, tuple(tiles))


@dataclass(frozen=True)
class Glm4vAdapter(QwenVLAdapter):
    """As Qwen-VL, but frames have the id of pictures, by which transformers' model puts in both."""

    def check_together(self, chats: Sequence[Sequence[Message]]) -> None:
        """Pictures and videos cannot stand in one batch."""
        check_apart(self.family, chats)
