"""Soft-capped attention logits need an attention that caps them."""

from __future__ import annotations

from typing import Any


def keep_soft_cap(model: Any) -> None:
    """Runs a language model with soft-capped logits (Gemma 2) in eager attention where it would run in sdpa.

    sdpa has no cap. transformers refuses the pair or never chooses it since a version after 5.17;
    before, it left the cap out and said nothing.
    """
    text = model.config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if capped and text._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": "eager"})
