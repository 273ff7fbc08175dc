"""What can be traced, what can run under a policy, and which layers: decided by what a model is.

Asked wherever a model is switched, so by `apply`, `record`, adapters and every command alike.
A layer's role follows from the cache layer that transformers gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from avlprof.attention.call import AttentionCall
from avlprof.attention.modality import vision_token_ids
from avlprof.errors import UserError


def unwrapped(model: Any) -> Any:
    """The model of transformers inside wrappers: PEFT, `torch.compile`, data parallel.

    Adapters of PEFT are part of the model's layers and stay at work.

    Raises:
        UserError: there is none inside.
    """
    for _ in range(8):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), torch.nn.Module) and not hasattr(model, "config"):
            model = model.module
        else:
            break
    if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
        raise UserError(f"{type(model).__name__} is not a model of transformers; give the model itself")
    return model


class Role(Enum):
    """What a decoder layer keeps of the tokens that it has seen, in words."""

    FULL = "a key and a value of every token"
    WINDOW = "keys and values of a window of tokens"
    STATE = "a state of fixed size (linear attention or convolution)"
    NONE = "nothing (no attention)"
    SHARED = "nothing of its own: it reads the keys and values of another layer"
    LATENT = "latents that keys and values are made from (MLA)"
    CHOSEN = "keys that it chooses by an index of its own"
    OTHER = "its state in a form that is not known"


@dataclass(frozen=True)
class LayerRole:
    """A layer's role; `lends` where other layers read its keys and values."""

    role: Role
    lends: bool = False

    @property
    def governed(self) -> bool:
        """Whether a policy acts on the layer."""
        return self.role is Role.FULL and not self.lends

    @property
    def what(self) -> str:
        """What the layer does with keys and values, to stand behind its number."""
        return "lends its keys and values to others" if self.lends else f"keeps {self.role.value}"

    @property
    def attends(self) -> bool:
        """Whether the layer has attention to record."""
        return self.role not in (Role.STATE, Role.NONE)


def layer_roles(text_config: Any) -> list[LayerRole]:
    """The role of each decoder layer, by the cache that transformers makes for the text config."""
    stock = DynamicCache(config=text_config).layers
    sharing = list(getattr(text_config, "kv_sharing_modes", None) or [None] * len(stock))
    read = any(str(mode or "").startswith("reuse") for mode in sharing)
    own = getattr(text_config, "per_layer_config", None) or [text_config] * len(stock)
    return [
        LayerRole(_role(layer, str(mode or ""), config), lends=read and mode == "store")
        for layer, mode, config in zip(stock, sharing, own, strict=True)
    ]


def governed_layers(text_config: Any) -> tuple[int, ...] | None:
    """The layers that a policy acts on, where a model has others too; None means all."""
    roles = layer_roles(text_config)
    own = tuple(index for index, role in enumerate(roles) if role.governed)
    return None if len(own) == len(roles) else own


def governed_config(text_config: Any) -> Any:
    """The config of a layer that a policy acts on; models may state sizes layer by layer."""
    own = getattr(text_config, "per_layer_config", None)
    if own is None:
        return text_config
    return own[next((i for i, role in enumerate(layer_roles(text_config)) if role.governed), 0)]


def head_size(text_config: Any) -> int:
    """Numbers of a head in the layers that a policy acts on."""
    config = governed_config(text_config)
    stated = getattr(config, "head_dim", None)
    return int(stated or text_config.hidden_size // config.num_attention_heads)


def _role(layer: Any, sharing: str, config: Any) -> Role:
    """By name where a class is newer than the oldest transformers that is supported."""
    kind = type(layer).__name__
    if sharing.startswith("reuse"):
        return Role.SHARED
    if kind == "DummyLayer":
        return Role.NONE
    if kind == "LinearAttentionLayer":
        return Role.STATE
    if type(layer) is DynamicSlidingWindowLayer:
        return Role.WINDOW
    if type(layer) is DynamicLayer:
        return Role.LATENT if getattr(config, "kv_lora_rank", None) else Role.FULL
    if hasattr(layer, "update_indexer") or hasattr(layer, "update_index"):
        return Role.CHOSEN
    return Role.OTHER


def check_config(config: Any) -> None:
    """Refuse a kind of model whose pictures are not among the tokens of the decoder's prompt.

    Raises:
        UserError: an encoder beside the decoder, cross-attention to pictures, or no vision tokens.
    """
    kind, text = config.model_type, config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UserError(
            f"model type '{kind}' is an encoder-decoder, whose pictures are not in the decoder's prompt; "
            "use a decoder-only model"
        )
    if getattr(text, "cross_attention_layers", None) or getattr(config, "cross_layer_interval", None):
        raise UserError(
            f"model type '{kind}' looks at pictures through cross-attention and has no vision tokens in its "
            "prompt; use a model that has"
        )
    vision_token_ids(config)


def check_traced(model: Any) -> None:
    """Refuse a model whose attention to pictures cannot be followed.

    Args:
        model: a model of transformers, without wrappers.

    Raises:
        UserError: as `check_config`; a language model that generates from embeddings, tokens that are
            not written one by one, or a decoder without layers.
    """
    check_config(model.config)
    if _generates_by_itself(model):
        raise UserError(
            f"model type '{model.config.model_type}' does not write its answer token by token behind a "
            "prompt of token ids, which is what avlprof follows; use a model with transformers' own generate"
        )
    decoder_of(model)


def governed_roles(text_config: Any) -> list[LayerRole]:
    """The roles of a language model's layers, of which a policy can act on one at least.

    Raises:
        UserError: there is none; the model can be traced.
    """
    roles = layer_roles(text_config)
    if all(role.role is Role.WINDOW for role in roles):
        raise UserError(
            "every layer attends by a sliding window, which policies leave as it is; "
            "use a model with full-attention layers"
        )
    if not any(role.governed for role in roles):
        first = next((index for index, role in enumerate(roles) if role.role is not Role.WINDOW), 0)
        what = roles[first].what
        raise UserError(
            f"model type '{text_config.model_type}' has no full-attention layer that a policy could act on: "
            f"layer {first} {what}; it can be traced"
        )
    return roles


def decoder_of(model: Any) -> Any:
    """The module of a model that holds the decoder layers, as `.layers`, and their config.

    Raises:
        UserError: there is none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    while decoder is not None and not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model
    if decoder is None or not hasattr(decoder, "layers") or not hasattr(decoder, "config"):
        raise UserError(
            f"{type(model).__name__} has no decoder with layers, so its attention cannot be followed"
        )
    return decoder


def _generates_by_itself(model: Any) -> bool:
    """Whether a model's `generate` is not the one of transformers and goes around the model's own forward."""
    from transformers import GenerationMixin

    own = getattr(type(model), "generate", None)
    if own is None or own is GenerationMixin.generate:
        return own is None
    if "diffusion" in str(getattr(model.config, "model_type", "")).lower():
        return True
    nested = (child for child in model.modules() if child is not model)
    return any(getattr(child, "can_generate", bool)() for child in nested)


NEUTRAL: Final = frozenset(
    {
        "position_ids", "use_cache", "sliding_window", "softcap", "dropout", "logits_to_keep", "image_sizes",
        "output_attentions", "output_hidden_states", "output_router_logits", "is_causal",
        "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
        "cache_position", "mm_token_type_ids", "token_type_ids", "return_dict", "target_dtype",
    }
)  # fmt: skip
"""Options of an attention call that change no weight, or that are read where they are needed."""

CHOICES: Final = frozenset({"indices", "block_indices"})
"""Keys that a layer chose for each row; under sdpa and eager attention the mask holds them as well."""

SINKS: Final = "s_aux"
"""A learned logit of each query head that takes part in the softmax."""


def check_call(call: AttentionCall, seen: set[int], measured: bool, full: bool, implementation: str) -> None:
    """Refuse a call that is not what avlprof takes it for; asked at each call of a pass.

    Args:
        seen: layers that have called in this pass.
        measured: a policy acts on the layer, or its weights are recorded.
        full: the layer keeps a key and a value of every token.
        implementation: the attention that the model is set to.

    Raises:
        UserError: an argument that is not known, or a second call of a layer.
    """
    name = type(call.module).__name__
    for option, value in call.options.items():
        if value is None or option in NEUTRAL or option == SINKS:
            continue
        if option in ("position_bias", "sinks") and not measured:
            continue
        if option in CHOICES and implementation in ("sdpa", "eager"):
            continue
        raise UserError(
            f"the attention of {name} takes '{option}', which avlprof does not know how to follow"
        )
    if measured and full and call.mask is not None and call.mask.shape[1] > 1:
        raise UserError(
            f"layer {call.layer} ({name}) hides keys from each head in a way of its own, "
            "which cannot be followed"
        )
    if call.layer in seen:
        raise UserError(
            f"layer {call.layer} ({name}) calls attention twice in a pass, which cannot be followed"
        )
