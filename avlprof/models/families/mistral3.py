"""Mistral 3: every image has a grid of its own size, with break tokens of text between its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter
from avlprof.models.tiles import Layout, grid


@dataclass(frozen=True)
class Mistral3Adapter(Adapter):
    """A Pixtral tower (arXiv 2410.07073) at native resolution, squares of patches merged to a token."""

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """The merged grid of one image, from `image_sizes` (int64 [images, 2], in pixels)."""
        sizes = encoding.get("image_sizes")
        if sizes is None or image >= len(sizes):
            return None
        config = self.model.config
        token = int(config.vision_config.patch_size) * int(config.spatial_merge_size)
        height, width = (int(pixels) for pixels in sizes[image])
        return grid(height // token, width // token)
