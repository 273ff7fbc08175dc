"""The embedded model's processor before language models that policies govern in part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import Lfm2Config, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from avlprof.models import adapter_for
from avlprof.testing.models import finished

WINDOWED = ("sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention")
STATES = ("conv", "full_attention", "conv", "conv", "full_attention")
WINDOW = 24


def windowed(loaded: Any) -> Any:
    """The embedded model with fewer layers, two of them with a sliding window: layers 1, 3, 4 are governed.

    The answers are still what its weights say; they are no longer right.
    """
    layers = {"layer_types": list(WINDOWED), "use_sliding_window": True, "sliding_window": WINDOW}
    return _over(loaded, Qwen2Config(**_text(loaded, WINDOWED), **layers))


def stateful(loaded: Any) -> Any:
    """A random language model of LFM2 behind the embedded model's tower: layers 1 and 4 are governed."""
    return _over(loaded, Lfm2Config(**_text(loaded, STATES), layer_types=list(STATES)))


def _text(loaded: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    text = loaded.model.config.text_config
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
        "tie_word_embeddings",
    )
    return {name: getattr(text, name) for name in names} | {"num_hidden_layers": len(kinds), "head_dim": 32}


def _over(loaded: Any, text: Any) -> Any:
    old = loaded.model
    config = LlavaConfig(**old.config.to_dict() | {"text_config": text.to_dict()})
    model = finished(LlavaForConditionalGeneration, config, 0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("_proj.bias"):
                value.zero_()
    model.load_state_dict(
        {name: value for name, value in old.state_dict().items() if name in model.state_dict()}, strict=False
    )
    model.tie_weights()
    model.generation_config = old.generation_config
    name = f"tiny over {text.model_type}"
    adapter = adapter_for(model, loaded.processor)
    return replace(loaded, model=model, name=name, source=name, revision=text.model_type, adapter=adapter)
