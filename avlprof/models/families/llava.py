"""LLaVA 1.5: every image is one square of patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter


@dataclass(frozen=True)
class LlavaAdapter(Adapter):
    """Patches of a vision tower of fixed size, one vision token each (arXiv 2310.03744)."""

    def vision_grid(self, encoding: Mapping[str, Tensor], image: int = 0) -> tuple[int, int] | None:
        """The square of patches; None for a strategy that keeps the class token among them."""
        config = self.model.config
        side = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        return (side, side) if config.vision_feature_select_strategy == "default" else None
