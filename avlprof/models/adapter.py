"""What the rest of the package asks of a model: its decoder, its shapes, its vision positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from avlprof.attention.gate import (
    LayerRole,
    check_traced,
    decoder_of,
    governed_config,
    governed_layers,
    head_size,
    layer_roles,
)
from avlprof.attention.modality import vision_token_ids
from avlprof.errors import UserError
from avlprof.models.chat import chat_text, lacking, one_line, processor_inputs
from avlprof.models.tiles import Layout, Tile
from avlprof.policy import said_governed, scale_group
from avlprof.tasks.sample import Sample
from avlprof.tasks.turn import Message


@dataclass(frozen=True)
class Adapter:
    """A vision-language model of transformers, seen through its config and its processor.

    Everything comes from the config and the prompt, so one adapter serves every decoder-only
    family whose vision tokens stand in the prompt, one id per token. A family that differs
    overrides what differs (`avlprof/models/families/`); get the right one from `adapter_for`.

    `processor` may be None where prompts are made elsewhere; then `encode` and `decode` refuse.

    Raises:
        UserError: the model is of a kind that avlprof does not serve (`avlprof.attention.gate`).
    """

    model: Any
    processor: Any = None

    def __post_init__(self) -> None:
        check_traced(self.model)
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
        decoder: nn.Module = decoder_of(self.model)
        return decoder

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(getattr(self.decoder, "layers", ()))

    @cached_property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self._layer_config.num_attention_heads)

    @cached_property
    def kv_heads(self) -> int:
        """Key-value heads of a layer: fewer than `heads` under grouped-query attention."""
        return int(getattr(self._layer_config, "num_key_value_heads", None) or self.heads)

    @cached_property
    def head_dim(self) -> int:
        """Width of one head."""
        return head_size(self.text_config)

    @cached_property
    def group(self) -> int:
        """Numbers of a head that share a scale where vision is stored in few bits."""
        return scale_group(self.head_dim)

    @cached_property
    def roles(self) -> list[LayerRole]:
        """What each layer keeps of its tokens, and whether a policy acts on it."""
        return layer_roles(self.text_config)

    @cached_property
    def governed(self) -> tuple[int, ...] | None:
        """The layers that a policy acts on, where there are others too; None means all."""
        return governed_layers(self.text_config)

    @property
    def partly_governed(self) -> str:
        """What a reader of budgets has to know where policies leave layers as they are; else empty."""
        return said_governed(self.governed, self.layers)

    @property
    def _layer_config(self) -> Any:
        return governed_config(self.text_config)

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
        """Bytes of the key and the value of one token in one layer; `dtype` defaults to the model's.

        Where a model keeps latents (MLA) their bytes, and those of the keys' rotated part.
        """
        latent = getattr(self._layer_config, "kv_lora_rank", None)
        rotated = getattr(self._layer_config, "qk_rope_head_dim", 0)
        numbers = latent + rotated if latent else 2 * self.kv_heads * self.head_dim
        return int(numbers) * (dtype or self.model.dtype).itemsize

    def vision_mask(self, input_ids: Tensor) -> Tensor:
        """Which positions of a prompt are vision tokens: bool, of the shape of `input_ids`.

        Only for prompts: a generated id can equal a vision token's.
        """
        return torch.isin(input_ids, torch.tensor(self.vision_token_ids, device=input_ids.device))

    def image_layout(
        self, encoding: Mapping[str, Tensor], image: int = 0, size: tuple[int, int] | None = None
    ) -> Layout | None:
        """How the vision tokens of one picture lie in it.

        Args:
            encoding: what `encode_chats` returned.
            image: which of its pictures, counted row by row, videos left out.
            size: the picture's width and height before the processor had it. Without them a
                family that cuts tiles by the picture's shape, and does not say how, gives None.

        Returns:
            The layout, its tiles counted from the picture's own first vision token; None where
            the family has none that could be recovered.
        """
        return None

    def video_layout(self, encoding: Mapping[str, Tensor], video: int = 0, frames: int = 0) -> Layout | None:
        """How the vision tokens of one video lie in its frames: a tile for each that it keeps.

        `video` counts the videos of the encoding and `frames` says how many this one had; else
        as `image_layout`.
        """
        return None

    def vision_layout(
        self, encoding: Mapping[str, Tensor], chats: Sequence[Sequence[Message]]
    ) -> list[tuple[tuple[Tile, ...], ...]]:
        """The tiles of all that each row shows, for heatmaps over the pictures.

        Args:
            encoding: what `encode_chats(chats)` returned.

        Returns:
            For each row the tiles of each of its pictures and video frames, in the order of
            `Message.pictures`; they count among the row's vision tokens. A row whose layout cannot
            be recovered, or does not add up to its vision tokens, has an empty tuple. A frame that
            shares its tokens with an earlier one has no tiles.
        """
        totals = self.vision_mask(encoding["input_ids"]).sum(dim=1).tolist()
        tiles: list[tuple[tuple[Tile, ...], ...]] = []
        images = videos = 0
        for chat, total in zip(chats, totals, strict=True):
            parts: list[tuple[Layout | None, int]] = []
            for message in chat:
                for picture in message.images:
                    parts.append((self.image_layout(encoding, images, picture.size), 1))
                    images += 1
                for frames in message.videos:
                    parts.append((self.video_layout(encoding, videos, len(frames)), len(frames)))
                    videos += 1
            tiles.append(_in_a_row(parts, total))
        return tiles

    def prompt(self, chat: Sequence[Message]) -> str:
        """The text of a conversation in the model's own chat form; see `encode_chats`."""
        return chat_text(self._processor(), self.family, chat)

    def encode(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """`encode_chats` of rows that are one prompt each: `images[i]`, then `prompts[i]`."""
        if len(prompts) != len(images) or not prompts:
            raise UserError(
                f"encode needs images for every prompt, got {len(prompts)} prompts, {len(images)} rows"
            )
        return self.encode_chats(
            [[Message("user", text, tuple(row))] for text, row in zip(prompts, images, strict=True)]
        )

    def encode_samples(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """`encode_chats` of the conversations of samples."""
        return self.encode_chats([sample.messages() for sample in samples])

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> dict[str, Tensor]:
        """A left-padded batch on the model's device, as `model.generate(**batch)` takes it.

        A row is a conversation in the model's own chat form, ready for the answer; a message shows
        its pictures and videos (none, one or several) before its text. `input_ids` and
        `attention_mask` are int64 [rows, tokens]; pixel tensors have the model's dtype, and their
        shapes and companions are the family's.

        Raises:
            UserError: the processor refuses the prompts, has no place for videos or no template
                for a conversation, or the family cannot take them in one batch.
        """
        processor = self._processor()
        self.check_together(chats)
        texts = [self.prompt(chat) for chat in chats]
        begin = processor.tokenizer.bos_token
        try:
            batch = processor(
                text=texts,
                **processor_inputs(chats),
                padding=len(texts) > 1,
                padding_side="left",
                # a template that writes the beginning itself must not get a second one
                add_special_tokens=not (begin and texts[0].startswith(begin)),
                return_tensors="pt",
            )
        except UserError:
            raise
        except Exception as error:  # processors are many, and raise what they please
            names = " and ".join(lacking(processor))
            hint = f"; give it {names} in processor_config.json" if names else ""
            raise UserError(
                f"the processor of '{self.family}' cannot encode this prompt: {one_line(error)}{hint}"
            ) from error
        encoding = {
            name: self._on_device(value)
            for name, value in batch.items()
            if isinstance(value, Tensor) and self._takes(name)
        }
        self._check_seen(encoding, chats)
        return encoding

    def _takes(self, name: str) -> bool:
        """Whether the model takes a tensor of this name; older exports list more than it does.

        Labels, which PaliGemma's processor makes, would ask it for a loss.
        """
        return name != "labels" and (not self._arguments or name in self._arguments)

    @cached_property
    def _arguments(self) -> frozenset[str]:
        """Names that forward calls and `generate` take; empty where the model does not say."""
        forward = set(inspect.signature(self.model.forward).parameters)
        prepare = getattr(self.model, "prepare_inputs_for_generation", None)
        more = set(inspect.signature(prepare).parameters) if prepare is not None else set()
        return frozenset(forward | more) if "input_ids" in forward else frozenset()

    def _check_seen(self, encoding: Mapping[str, Tensor], chats: Sequence[Sequence[Message]]) -> None:
        """`UserError` where a row has pictures, and its prompt no vision token."""
        tokens = self.vision_mask(encoding["input_ids"]).sum(dim=1).tolist()
        for chat, count in zip(chats, tokens, strict=True):
            if not count and any(message.images or message.videos for message in chat):
                raise UserError(
                    f"the prompt of '{self.family}' has no place for its pictures; check the chat template "
                    "and the image token of the model's folder"
                )

    def check_together(self, chats: Sequence[Sequence[Message]]) -> None:
        """Refuses what the family cannot take in one batch (`avlprof.models.chat`); here nothing."""

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of token ids, without special tokens and outer blanks."""
        texts = self._processor().tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else value.dtype)

    def _processor(self) -> Any:
        if self.processor is None:
            raise UserError(
                f"this adapter of '{self.family}' has no processor; build it as adapter_for(model, processor)"
            )
        return self.processor


def _in_a_row(parts: Sequence[tuple[Layout | None, int]], total: int) -> tuple[tuple[Tile, ...], ...]:
    """Tiles of each picture and frame, counted among `total` tokens; empty where they do not add up."""
    by_picture: list[tuple[Tile, ...]] = []
    before = 0
    for layout, frames in parts:
        if layout is None:
            return ()
        tiles = [tile.behind(before) for tile in layout.tiles]
        last = frames - 1
        by_picture += [tuple(t for t in tiles if min(t.frame, last) == frame) for frame in range(frames)]
        before += layout.tokens
    return tuple(by_picture) if before == total else ()
