"""What the rest of the package asks of a model: its decoder, its shapes, its vision positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from avlprof.attention.modality import vision_token_ids
from avlprof.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """A vision-language model of transformers, seen through its config and its processor.

    Everything comes from the config and the prompt, so one adapter serves every decoder-only
    family whose vision tokens stand in the prompt, one id per token. A family that differs
    overrides what differs (`avlprof/models/families/`); get the right one from `adapter_for`.

    `processor` may be None where prompts are made elsewhere; then `encode` and `decode` refuse.

    Raises:
        UserError: the model has no vision tokens in its prompt, or no decoder layers.
    """

    model: Any
    processor: Any = None

    def __post_init__(self) -> None:
        cross = getattr(self.text_config, "cross_attention_layers", None)
        if not self.vision_token_ids or cross:
            raise UserError(
                f"model type '{self.family}' has no vision tokens in its prompt; use a model that has"
            )
        if self.layers == 0:
            raise UserError(
                f"model type '{self.family}' has no list of decoder layers; use a decoder-only model"
            )

    @property
    def family(self) -> str:
        """The `model_type` of the config."""
        return str(self.model.config.model_type)

    @property
    def text_config(self) -> Any:
        """The config of the language model."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head; it has `.layers`."""
        found: nn.Module = self.model.get_decoder()
        return found

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(getattr(self.decoder, "layers", ()))

    @cached_property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self.text_config.num_attention_heads)

    @cached_property
    def kv_heads(self) -> int:
        """Key-value heads of a layer: fewer than `heads` under grouped-query attention."""
        return int(getattr(self.text_config, "num_key_value_heads", None) or self.heads)

    @cached_property
    def head_dim(self) -> int:
        """Width of one head."""
        stated = getattr(self.text_config, "head_dim", None)
        return int(stated or self.text_config.hidden_size // self.heads)

    @cached_property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Token ids that stand for one vision token each, of images and of videos."""
        return vision_token_ids(self.model.config)

    @cached_property
    def sliding_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose attention is a sliding window."""
        kinds = getattr(self.text_config, "layer_types", None)
        if kinds is None:
            windowed = getattr(self.text_config, "sliding_window", None) is not None
            return tuple(range(self.layers)) if windowed else ()
        return tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")

    def kv_bytes_per_token_per_layer(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the key and the value of one token in one layer; `dtype` defaults to the model's."""
        return 2 * self.kv_heads * self.head_dim * (dtype or self.model.dtype).itemsize

    def vision_mask(self, input_ids: Tensor) -> Tensor:
        """Which positions of a prompt are vision tokens: bool, of the shape of `input_ids`.

        Only for prompts: a generated id can equal a vision token's.
        """
        return torch.isin(input_ids, torch.tensor(self.vision_token_ids, device=input_ids.device))

    def vision_grid(self, encoding: Mapping[str, Tensor], image: int = 0) -> tuple[int, int] | None:
        """Rows and columns in which the vision tokens of one image lie, row after row.

        `encoding` is what `encode` returned and `image` counts its images, row by row. None where
        the family's tokens form no single grid (tiles, resamplers).
        """
        return None

    def prompt(self, text: str, images: int) -> str:
        """The prompt in the model's own chat form, images first, ready for the answer.

        A processor without a chat template (base models, PaliGemma) gets its image tokens and
        then the bare text.
        """
        processor = self._processor()
        if getattr(processor, "chat_template", None) is None:
            return str(getattr(processor, "image_token", "<image>")) * images + text
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """A left-padded batch on the model's device, as `model.generate(**batch)` takes it.

        Row i holds `images[i]` (none, one or several) and then `prompts[i]`. `input_ids` and
        `attention_mask` are int64 [rows, tokens]; pixel tensors have the model's dtype, and their
        shapes and companions are the family's.

        Raises:
            UserError: the two sequences differ in length, or the processor refuses them.
        """
        processor = self._processor()
        if len(prompts) != len(images) or not prompts:
            raise UserError(
                f"encode needs images for every prompt, got {len(prompts)} prompts, {len(images)} rows"
            )
        texts = [self.prompt(text, len(row)) for text, row in zip(prompts, images, strict=True)]
        begin = processor.tokenizer.bos_token
        try:
            batch = processor(
                text=texts,
                images=[list(row) for row in images] if any(images) else None,
                padding=len(texts) > 1,
                padding_side="left",
                # a template that writes the beginning itself must not get a second one
                add_special_tokens=not (begin and texts[0].startswith(begin)),
                return_tensors="pt",
            )
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"the processor of '{self.family}' cannot encode this prompt: {error}") from error
        return {name: self._place(value) for name, value in batch.items()}

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of token ids, without special tokens and outer blanks."""
        texts = self._processor().tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def _place(self, value: Tensor) -> Tensor:
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else value.dtype)

    def _processor(self) -> Any:
        if self.processor is None:
            raise UserError(
                f"this adapter of '{self.family}' has no processor; build it as adapter_for(model, processor)"
            )
        return self.processor
