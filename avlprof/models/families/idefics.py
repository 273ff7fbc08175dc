"""Idefics3 and SmolVLM: rows x columns of sub-images, and then the whole picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter
from avlprof.models.families.tiled import tiled
from avlprof.models.tiles import Layout


@dataclass(frozen=True)
class IdeficsAdapter(Adapter):
    """Sub-images of merged patches, each behind a tag that names its row and column (2408.12637)."""

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """Sub-images and the whole picture; None without the picture's size or without a processor."""
        cutter = getattr(self.processor, "image_processor", None)
        if size is None or cutter is None:
            return None
        _, rows, columns = cutter.get_number_of_image_patches(size[1], size[0])
        config = self.model.config
        patches = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        return tiled(max(rows, 1), max(columns, 1), patches // int(config.scale_factor))
