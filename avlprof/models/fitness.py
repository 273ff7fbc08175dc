"""Which kinds of model can be traced and run under a policy, by their config."""

from __future__ import annotations

from typing import Any, Final

from avlprof.attention.modality import vision_token_ids
from avlprof.errors import UserError

KINDS: Final = ("full_attention", "sliding_attention")
"""Layer kinds whose keys and values are those of every token, or of a window of them."""


def check_fits(config: Any) -> None:
    """Refuse a model that keeps no keys and values of its vision tokens, or not in every layer.

    Raises:
        UserError: cross-attention to pictures, an encoder beside the decoder, layers without
            a key and value for every token (linear attention, convolution, chunks), layers that
            share their keys and values, or no vision tokens in the prompt.
    """
    kind = config.model_type
    text = config.get_text_config(decoder=True)
    if getattr(text, "cross_attention_layers", None):
        raise UserError(
            f"model type '{kind}' looks at pictures through cross-attention and has no vision tokens in its "
            "prompt; use a model that has"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UserError(
            f"model type '{kind}' is an encoder-decoder, whose pictures are not in the decoder's prompt; "
            "use a decoder-only model"
        )
    others = sorted(set(getattr(text, "layer_types", None) or KINDS) - set(KINDS))
    if others:
        raise UserError(
            f"model type '{kind}' has layers of kind {others[0]}, which no policy is made for; use a model "
            "whose layers are full or sliding-window attention"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise UserError(
            f"model type '{kind}' has layers that share their keys and values, which no policy is made for; "
            "use a model whose layers have their own"
        )
    vision_token_ids(config)


def keep_soft_cap(model: Any) -> None:
    """Runs a language model with soft-capped logits (Gemma 2) in eager attention where it would run in sdpa.

    sdpa has no cap. transformers refuses the pair or never chooses it since a version after 5.17;
    before, it left the cap out and said nothing.
    """
    text = model.config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if capped and text._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": "eager"})
