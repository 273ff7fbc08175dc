"""The embedded models: they know one kind of picture, and say so of others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

from avlprof.models.adapter import Adapter
from avlprof.models.families.llava import LlavaAdapter
from avlprof.models.families.qwen_vl import QwenVLAdapter
from avlprof.models.tiny import FOREIGN
from avlprof.tasks.shapes.scene import is_drawn
from avlprof.tasks.turn import Message

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OneKindAdapter(Adapter):
    """A model whose first picture of another kind than task `shapes` draws gives one warning."""

    _warned: list[str] = field(default_factory=list, repr=False, compare=False)

    def foreign(self, picture: Image.Image) -> str | None:
        """What to say of a picture that the model does not know; None for those of its own kind."""
        return None if is_drawn(picture) else FOREIGN

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> dict[str, Tensor]:
        if not self._warned:
            pictures = (picture for chat in chats for message in chat for picture in message.pictures())
            said = next(filter(None, map(self.foreign, pictures)), None)
            if said is not None:
                self._warned.append(said)
                _log.warning(said)
        return super().encode_chats(chats)


@dataclass(frozen=True)
class TinyAdapter(OneKindAdapter, LlavaAdapter):
    """`tiny`: LLaVA 1.5."""


@dataclass(frozen=True)
class TinyMropeAdapter(OneKindAdapter, QwenVLAdapter):
    """`tiny-mrope`: Qwen2.5-VL."""


class PictureProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its part for videos, which needs torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        chat_template: str | None = None,
        **_: Any,
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        at = tokenizer.convert_tokens_to_ids if tokenizer is not None else lambda token: None
        self.image_token_id, self.video_token_id = at(self.image_token), at(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


EMBEDDED_ADAPTERS: Final[dict[str, type[OneKindAdapter]]] = {
    "llava": TinyAdapter,
    "qwen2_5_vl": TinyMropeAdapter,
}
"""Adapter of an embedded model by its `model_type`."""
