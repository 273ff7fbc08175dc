"""Families that see every image as one square of vision tokens: ViP-LLaVA, PaliGemma, Gemma 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter
from avlprof.models.families._boxes import shown_box
from avlprof.models.tiles import Layout, grid


@dataclass(frozen=True)
class SquareAdapter(Adapter):
    """One token a patch (arXiv 2312.00784, 2407.07726), or one a pooled square of them (2503.19786)."""

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """The square: of the tokens that the config promises for an image, or else of its patches."""
        config = self.model.config
        pooled = getattr(config, "mm_tokens_per_image", None)
        if pooled is not None:
            side = math.isqrt(int(pooled))
        else:
            side = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        return grid(side, side, shown_box(getattr(self.processor, "image_processor", None), size))
