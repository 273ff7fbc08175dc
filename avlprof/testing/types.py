"""A small random model of any image-text-to-text type of transformers, and prompts for it.

Vision towers are built and never run: a prompt has the ids of vision tokens in place, and a hook
on the embedding gives each of them features of its own. What the language model does with its
vision tokens is real; what a tower makes of pixels is not seen here (`avlprof.testing.families`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModel,
    GenerationConfig,
)

from avlprof.attention.modality import vision_token_ids
from avlprof.errors import UserError
from avlprof.testing.shrink import (
    BOS,
    FIRST_WORD,
    HEAD_DIM,
    IMAGE,
    LAST_WORD,
    PAD,
    Config,
    tiny_config,
    tiny_text,
)

_TIMM: Final = ("timm_wrapper", "gemma3n_vision")  # towers of a package that is no dependency of ours
_GAINS: Final = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0}
_FEATURES: Final = 256
_ALTERNATING: Final = ["sliding_attention", "full_attention"]


def _gemma4(pairs: int, **text: Any) -> Config:
    wide = {index: {"head_dim": 2 * HEAD_DIM} for index in range(1, 2 * pairs, 2)}
    whole = {
        "layer_types": _ALTERNATING * pairs,
        "num_hidden_layers": 2 * pairs,
        "per_layer_config": wide,
    } | text
    return {f"text_config.{name}": value for name, value in whole.items()}


VARIANTS: Final[dict[str, tuple[str, Config]]] = {
    "gemma4:whole": ("gemma4", _gemma4(2, layer_types=["full_attention"] * 4, per_layer_config={})),
    "gemma4:shared": ("gemma4", _gemma4(3, num_kv_shared_layers=2)),
    "gemma4:values are keys": ("gemma4", _gemma4(2, attention_k_eq_v=True)),
    "gemma4:two-way pictures": ("gemma4", _gemma4(2, use_bidirectional_attention="vision")),
    "minimax_m3_vl:sparse": (
        "minimax_m3_vl",
        {
            "text_config.layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "text_config.index_topk_blocks": 2,
        },
    ),
}
"""Kinds of layers that published checkpoints of a type have, and its default config has not."""


def model_types() -> list[str]:
    """Every image-text-to-text type of the installed transformers."""
    return sorted({config.model_type for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING})


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model in eval mode, its attention peaked and no part of it at zero.

    Args:
        name: a model type, one of `VARIANTS`, or `llava:gpt_oss` for LLaVA over any language model
            of transformers.
        seed: of weights and of the features of vision tokens.
    """
    model_type, changes = VARIANTS.get(name, (name, {}))
    if model_type.startswith("llava:"):
        model_type, text = model_type.split(":")
        changes = {"text_config": tiny_text(text)}
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]
    with torch.random.fork_rng(devices=[]), _towers_without_timm():
        torch.manual_seed(seed)
        model = kind(tiny_config(model_type, changes)).eval()
        _spread(model)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, do_sample=False)
    give_features(model, seed + 1)
    return model


def tiny_inputs(
    model: Any, batch: int = 1, seed: int = 0, picture: int = 12, words: int = 14
) -> dict[str, Tensor]:
    """Prompts with a picture of so many vision tokens behind the third word, padded on the left.

    Row i has i words fewer. Returns `input_ids` and `attention_mask`, int64 [batch, tokens], and
    the token types that the model's forward names, 1 on vision tokens (0 for PaliGemma, where they
    divide prompt and answer).
    """
    generator = torch.Generator().manual_seed(seed)
    vision = vision_ids(model)[:1] or (IMAGE,)
    rows = []
    for index in range(batch):
        text = torch.randint(FIRST_WORD, LAST_WORD, (words - index,), generator=generator).tolist()
        rows.append([PAD] * index + [BOS, *text[:3], *vision * picture, *text[3:]])
    ids = torch.tensor(rows)
    mask = torch.arange(ids.shape[1])[None] >= torch.arange(batch)[:, None]
    kinds = (ids == vision[0]).long() * (model.config.model_type != "paligemma")
    named = inspect.signature(model.forward).parameters
    types = {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in named}
    return {"input_ids": ids, "attention_mask": mask.long()} | types


def vision_ids(model: Any) -> tuple[int, ...]:
    """Ids of a model's vision tokens; none where it has none."""
    try:
        return vision_token_ids(model.config)
    except UserError:
        return ()


def give_features(model: Any, seed: int) -> Callable[[], None]:
    """Vision tokens get random features by their number in the row, until what is returned is called.

    The place of a token counts, and not what is embedded there: some types embed padding instead.
    """
    embedding = _embedding(model)
    if embedding is None:
        return lambda: None
    drawn = torch.Generator().manual_seed(seed)
    features = torch.randn(_FEATURES, embedding.embedding_dim, generator=drawn)
    vision = torch.tensor(vision_ids(model), dtype=torch.long)
    marked = torch.zeros(1, 1, dtype=torch.bool)

    def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal marked
        ids = options.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            marked = torch.isin(ids, vision)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.shape[:2] != marked.shape or output.shape[-1] != features.shape[-1]:
            return output
        order = marked.cumsum(dim=-1) % _FEATURES
        return torch.where(marked[..., None], features[order].to(output.dtype), output)

    handles = (
        model.register_forward_pre_hook(note, with_kwargs=True),
        embedding.register_forward_hook(hook),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _embedding(model: Any) -> nn.Embedding | None:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Activations near unit size, attention peaked; what starts at zero would make parts inert."""
    for name, value in model.named_parameters():
        if not value.is_floating_point():
            continue
        if "sink" in name:
            nn.init.normal_(value, mean=4.0)  # a fair share of a row's mass
        elif value.ndim < 2:
            value.add_(torch.randn_like(value) * 0.1)
        else:
            inputs = value[0].numel() if "conv" in name else value.shape[-1]
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
            nn.init.normal_(value, std=1.0 if "embed" in name else gain * max(inputs, 1) ** -0.5)


@contextlib.contextmanager
def _towers_without_timm() -> Iterator[None]:
    build = AutoModel.from_config

    def from_config(config: Any, **options: Any) -> Any:
        return nn.Identity() if config.model_type in _TIMM else build(config, **options)

    with patch.object(AutoModel, "from_config", from_config):
        yield
