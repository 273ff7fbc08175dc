"""The embedded model: its builder, its training, and the checkpoint that ships in `weights/`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

WEIGHTS: Final = Path(__file__).parent / "weights"


FOREIGN: Final = (
    "the embedded model knows only pictures such as its own task 'shapes' draws; "
    "what it says of others, and where it looks in them, means nothing"
)

from transformers import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin
class PictureProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
