"""A language model out of a GGUF file: weights, config and tokenizer as transformers has them.

GGUF is llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). It keeps the
rows of query and key heads in another order, for its way of rotating them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

_CONTROL = 3  # llama.cpp's number for tokens that are never text
_PARTS: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class LanguageModel:
    """A Llama in a GGUF file; needs the package `gguf`."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(str(path))

    def _field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self._field("llama.block_count"))

    def config(self) -> dict[str, Any]:
        """Arguments of `LlamaConfig`."""
        return {
            "vocab_size": len(self._field("tokenizer.ggml.tokens")),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": round(self._field("llama.attention.layer_norm_rms_epsilon"), 10),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self._field("llama.rope.freq_base"),
            },
            "tie_word_embeddings": True,
        }

    def weights(self, prefix: str = "model.language_model.") -> dict[str, Tensor]:
        """fp32 weights under transformers' names."""
        from gguf import dequantize

        found = {}
        for tensor in self._reader.tensors:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
            found[prefix + _named(tensor.name)] = self._ordered(tensor.name, weight)
        return found

    def _ordered(self, name: str, weight: Tensor) -> Tensor:
        if ".attn_q." in name:
            return unpermuted(weight, int(self._field("llama.attention.head_count")))
        if ".attn_k." in name:
            return unpermuted(weight, int(self._field("llama.attention.head_count_kv")))
        return weight

    def tokenizer(self, renamed: dict[int, str] | None = None) -> Tokenizer:
        """Byte-level BPE with single digits; `renamed` gives unused tokens a name by their id."""
        tokens = [
            (renamed or {}).get(i, token) for i, token in enumerate(self._field("tokenizer.ggml.tokens"))
        ]
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self._field("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return tokenizer


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in transformers' order, `[heads * size, in]`.

    llama.cpp rotates neighbouring rows, transformers row i with row i + size / 2.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _named(name: str) -> str:
    if name == "token_embd.weight":
        return "embed_tokens.weight"
    if name == "output_norm.weight":
        return "norm.weight"
    _, layer, part, end = name.split(".")
    return f"layers.{layer}.{_PARTS[part]}.{end}"
