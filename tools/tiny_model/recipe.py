"""What sets the embedded models apart while they are trained: one recipe each.

A recipe builds an untrained model and its processor, and tells the trainer where the vision tower
ends, what positions the tokens of a picture have, and in which frames the pictures are drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from avlprof.tasks.shapes.scene import PATCH_SIZE, Frame

ANSWER_ROOM = 204  # tokens of questions and answers behind a picture


@dataclass(frozen=True)
class Prefix:
    """The tokens up to the end of the picture: ids of length P, positions `[axes, P]`, and the next one."""

    ids: tuple[int, ...]
    positions: Tensor
    next: int


class Recipe(ABC):
    """One embedded model in training. Called in this order: build, `prefix`, then for every step the rest."""

    def __init__(self) -> None:
        self.processor: ProcessorMixin = self.build_processor()

    @abstractmethod
    def build_processor(self) -> Any:
        """Tokenizer and image processor, from nothing."""

    @abstractmethod
    def build_model(self, seed: int) -> Any:
        """The model as its training starts."""

    @abstractmethod
    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The vision tower, without what projects its features into the decoder."""

    @abstractmethod
    def features(self, model: PreTrainedModel, pixels: Mapping[str, Tensor]) -> Tensor:
        """The tower's last hidden states of the patches in row-major order, `[B, patches, width]`."""

    @abstractmethod
    def projected(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        """Features as the decoder takes them, `[B, patches, hidden]`."""

    @abstractmethod
    def prefix(self, frame: Frame) -> Prefix:
        """The tokens before the first question about a picture of this frame."""

    def frame(self, rng: np.random.Generator) -> Frame:
        """The frame of all pictures of a step."""
        return Frame()

    @abstractmethod
    def settle(self, model: PreTrainedModel) -> None:
        """What is done to a model whose tower is trained, before the joint stage."""

    def save_processor(self, folder: Path) -> None:
        """Write the processor's files."""
        self.processor.save_pretrained(folder)

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the tower takes of pictures."""
        return dict(self.processor.image_processor(list(pictures), return_tensors="pt"))

    @property
    def image_id(self) -> int:
        """The id of the placeholder of a patch."""
        return int(self.processor.image_token_id)

    def picture_ids(self, before: str, image: str, after: str, frame: Frame) -> tuple[int, ...]:
        """Token ids of a picture between two texts, its placeholder repeated once a patch."""
        tokenizer = self.processor.tokenizer
        marked = list(tokenizer(f"{before}{image}{after}").input_ids)
        token = tokenizer.convert_tokens_to_ids(image)
        at = marked.index(token)
        patches = (frame.width // PATCH_SIZE) * (frame.height // PATCH_SIZE)
        return (*marked[:at], *[token] * patches, *marked[at + 1 :])


def flat_positions(length: int) -> Tensor:
    """Positions of one axis that count up, int64 `[1, length]`."""
    return torch.arange(length)[None]
