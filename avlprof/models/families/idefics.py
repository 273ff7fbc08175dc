"""Idefics3 and SmolVLM: rows x columns of sub-images, and then the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from avlprof.models.adapter import Adapter
from avlprof.models.chat import check_apart
from avlprof.models.families.tiled import squares, tiled
from avlprof.models.tiles import Layout
from avlprof.tasks.turn import Message


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
        return tiled(max(rows, 1), max(columns, 1), self._side)

    @property
    def _side(self) -> int:
        """Vision tokens along a side of a part."""
        config = self.model.config
        patches = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        return patches // int(config.scale_factor)


@dataclass(frozen=True)
class SmolVLMAdapter(IdeficsAdapter):
    """As Idefics3; a frame of a video is one part (arXiv 2504.05299)."""

    def video_layout(self, encoding: Mapping[str, Tensor], video: int = 0, frames: int = 0) -> Layout | None:
        """One square a frame, each squeezed into it whole."""
        return squares(frames, self._side)

    def check_together(self, chats: Sequence[Sequence[Message]]) -> None:
        """Pictures and videos cannot stand in one batch: the processor returns both as `pixel_values`."""
        check_apart(self.family, chats)
