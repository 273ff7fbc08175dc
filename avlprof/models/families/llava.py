"""LLaVA 1.5: every image is one square of patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter
from avlprof.models.families._boxes import shown_box
from avlprof.models.tiles import Layout, grid


@dataclass(frozen=True)
class LlavaAdapter(Adapter):
    """Patches of a vision tower of fixed size, one vision token each (arXiv 2310.03744)."""

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """The square of patches; None for a strategy that keeps the class token among them."""
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            return None
        side = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        return grid(side, side, shown_box(getattr(self.processor, "image_processor", None), size))
