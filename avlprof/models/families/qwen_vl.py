"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: every image has a grid of its own size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter


@dataclass(frozen=True)
class QwenVLAdapter(Adapter):
    """Native resolution; squares of merged patches become one token (arXiv 2409.12191)."""

    def vision_grid(self, encoding: Mapping[str, Tensor], image: int = 0) -> tuple[int, int] | None:
        """The merged grid of one image, from `image_grid_thw` (int64 [images, 3], in patches)."""
        grids = encoding.get("image_grid_thw")
        if grids is None or image >= len(grids):
            return None
        merge = int(self.model.config.vision_config.spatial_merge_size)
        _, rows, columns = (int(size) for size in grids[image])
        return rows // merge, columns // merge
