"""Language models of known shapes with random weights, for timings: no download, no processor."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from avlprof.errors import UserError
from avlprof.registry import unknown

IMAGE = 3  # id of the vision token
FIRST_WORD = 8  # ids from here on are text
_TILE = 1_000_003  # random numbers drawn; prime, so that rows of a weight differ


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a vision-language model's decoder; `vision_tokens` and `text_tokens` are a usual prompt's.

    The vision tower of a random model is as small as its class allows: prompts are made of ids
    alone, so it never runs.
    """

    name: str
    family: Literal["llava", "llava_next", "qwen2_5_vl"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_tokens: int
    text_tokens: int = 100

    def __post_init__(self) -> None:
        counts = [f.name for f in fields(self) if f.type == "int"]
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} of shape '{self.name}' must be at least 1, got {getattr(self, name)}"
                )
        if self.heads % self.kv_heads or self.hidden % (2 * self.heads):
            raise UserError(
                f"shape '{self.name}' needs heads in multiples of kv_heads and hidden in multiples of "
                f"2 * heads, got hidden {self.hidden}, heads {self.heads}, kv_heads {self.kv_heads}"
            )
        if self.vocabulary <= FIRST_WORD:
            raise UserError(f"vocabulary must be above {FIRST_WORD}, got {self.vocabulary}")

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden // self.heads


SHAPES = {
    # Vicuna 7B: https://huggingface.co/llava-hf/llava-1.5-7b-hf
    "llava-1.5-7b": DecoderShape("llava-1.5-7b", "llava", 4096, 11008, 32, 32, 32, 32064, 576),
    # the Vicuna 7B variant, without grouped queries: https://huggingface.co/llava-hf/llava-v1.6-vicuna-7b-hf
    "llava-next-7b": DecoderShape("llava-next-7b", "llava_next", 4096, 11008, 32, 32, 32, 32064, 2880),
    # https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2.5-vl-7b": DecoderShape("qwen2.5-vl-7b", "qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, 4096),
    # the embedded model's
    "tiny": DecoderShape("tiny", "llava", 192, 384, 6, 6, 2, 424, 196, 16),
}
CUSTOM = "custom"


def decoder_shape(name: str, **changes: int | None) -> DecoderShape:
    """A shape by name, with other sizes where `changes` names them (None: no change).

    `custom` starts from `tiny` and needs at least one change.

    Raises:
        UserError: the name or a field is unknown, or a value is out of its range.
    """
    if name not in (*SHAPES, CUSTOM):
        raise unknown("shape", name, (*SHAPES, CUSTOM))
    wanted: dict[str, Any] = {field: value for field, value in changes.items() if value is not None}
    known = {field.name for field in fields(DecoderShape)} - {"name", "family"}
    for field in wanted:
        if field not in known:
            raise unknown("size of a shape", field, known)
    if name == CUSTOM and not wanted:
        raise UserError(
            f"shape 'custom' needs sizes, such as hidden and layers; known: {', '.join(sorted(known))}"
        )
    shape = SHAPES["tiny" if name == CUSTOM else name]
    return replace(shape, name=name, **wanted)


def random_model(
    shape: DecoderShape,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A model of this shape in eval mode with sdpa, `layers` of its decoder layers (None: all).

    Weights are random and of a size that keeps activations near 1, so no number overflows in
    half precision; attention is far less peaked than a trained model's.

    Raises:
        UserError: more layers than the shape has, or fewer than 1.
    """
    count = shape.layers if layers is None else layers
    if not 1 <= count <= shape.layers:
        raise UserError(f"layers must be in [1, {shape.layers}] for shape '{shape.name}', got {count}")
    kind, config = _KINDS[shape.family](shape, count)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device(device):
            model: PreTrainedModel = kind(config).eval()
    finally:
        torch.set_default_dtype(before)
    _fill(model, seed)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def prompt(
    model: PreTrainedModel,
    shape: DecoderShape,
    *,
    vision: int | None = None,
    text: int | None = None,
    system: int = 1,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of `system` text tokens, `vision` vision tokens and `text` text tokens; no pixels.

    Without pixels a vision token's embedding is that of its id, which costs the decoder the
    same. Vision and text default to the shape's.

    Returns:
        int64 `input_ids` and `attention_mask`, `[batch, system + vision + text]`.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = (system, shape.vision_tokens if vision is None else vision, text or shape.text_tokens)
    ids = torch.randint(FIRST_WORD, shape.vocabulary, (batch, sum(counts)), generator=generator)
    ids[:, system : system + counts[1]] = IMAGE
    ids = ids.to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _text_sizes(shape: DecoderShape, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 1 << 17,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def _llava(shape: DecoderShape, layers: int) -> tuple[Any, Any]:
    text = LlamaConfig(**_text_sizes(shape, layers))
    tower = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    config: Any = LlavaNextConfig if shape.family == "llava_next" else LlavaConfig
    kind = (
        LlavaNextForConditionalGeneration if shape.family == "llava_next" else LlavaForConditionalGeneration
    )
    return kind, config(vision_config=tower, text_config=text, image_token_index=IMAGE)


def _qwen(shape: DecoderShape, layers: int) -> tuple[Any, Any]:
    third = shape.head_dim // 2
    sections = [third - 2 * (third * 3 // 8), third * 3 // 8, third * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config=_text_sizes(shape, layers) | {"rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": shape.hidden,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    return Qwen2_5_VLForConditionalGeneration, config


_KINDS = {"llava": _llava, "llava_next": _llava, "qwen2_5_vl": _qwen}


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Weights from one tile of random numbers, repeated: filling gigabytes takes a copy's time."""
    generator = torch.Generator().manual_seed(seed)
    tile = torch.randn(_TILE, generator=generator)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2:
                weight.fill_(0.0 if name == "bias" else 1.0)  # norms
                continue
            fan_in = 1 if isinstance(module, nn.Embedding) else weight[0].numel()
            values = (tile * fan_in**-0.5).to(weight)
            flat = weight.view(-1)
            for start in range(0, len(flat), _TILE):
                part = flat[start : start + _TILE]
                part.copy_(values[: len(part)])
