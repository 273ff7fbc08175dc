"""Small configs of any model type: the default config of transformers, every size of it cut down.

Sizes are recognised by name, so that a type of a later release shrinks too. Of the layers one of
each kind stays, in the order that the type has them. What names do not tell is in `OWN`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, Final

from transformers import CONFIG_MAPPING

WIDTH: Final = 128
HEADS: Final = 4
HEAD_DIM: Final = WIDTH // HEADS
WINDOW: Final = 8  # tokens: fewer than any prompt has
VOCABULARY: Final = 192
PAD: Final = 0
BOS: Final = 1
IMAGE: Final = 2
VIDEO: Final = 3
FIRST_WORD: Final = 4
LAST_WORD: Final = 100  # ids from here on are other special tokens
DEPTH: Final = 3  # layers at least

Config = dict[str, Any]

_SIZES: Final = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"mel_vocab_size|codebook_size|num_embeddings", 64),
        (r".*vocab_size.*|vocab_offset", VOCABULARY),
        (r".*num_(global_)?key_value_heads|indexer_kv_heads", 2),
        (r"qk_rope_head_dim|d_rel", 8),
        (r"qk_nope_head_dim|v_head_dim|index(er)?_head_dim|linear_(key_|value_)?head_dim|mamba_head_dim", 16),
        (r"qk_head_dim", 24),
        (r"rotary_dim", HEAD_DIM // 2),
        (r".*head_dim|d_kv|.*dim_head", HEAD_DIM),
        (r"linear_num_heads|linear_num_key_heads|index(er)?_n_heads|n_groups", 2),
        (r"mamba_num_heads|.*num_heads|.*attention_heads|.*n_heads|.*_heads", HEADS),
        (r".*(num|n|local)_.*experts|num_experts", 4),
        (r".*experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
        (r"n_group|topk_group|.*n_shared_experts|moe_num_shared_experts", 1),
        (r".*lora_rank|.*_rank|hc_lowrank", 16),
        (r"hidden_size_per_layer_input", 16),
        (r".*intermediate_size.*|.*ffn_dim|d_ff|mlp_dim|share_expert_dim|moe_latent_size", WIDTH),
        (
            r".*hidden_sizes?|hidden_dim|d_model|embed_dim|.*projection_dim|.*_(in|out|input|output)_dim",
            WIDTH,
        ),
        (
            r"adapter_input_size|word_embed_proj_dim|.*_embed_dim|.*hidden_dim|projection_size|conv_output_size",
            WIDTH,
        ),
        (r".*num_hidden_layers|num_layers|depth|(en|de)coder_layers|.*decoder_(num_)?layers|layers", DEPTH),
        (r"num_global_layers|.*resampler_depth|merger_times|aligner_num_add_layers", 1),
        (r"sliding_window(_size)?|attention_chunk_size", WINDOW),
        (r"image_size|max_image_size|resolution|max_img_size|force_image_size|pos_emb_(height|width)", 32),
        (r"patch_size", 4),
        (r"image_seq_length|num_image_tokens|mm_tokens_per_image|num_patches|num_query_tokens", 64),
        (r"max_.*position.*|num_position_embeddings|max_vit_seq_len|position_embedding_size", 1024),
        (r"index_topk|index_topk_blocks|index_block_size|index_kpool", 4),
        (r"base_channels|latent_channels|num_pos_feats|post_conv_.*_channels", 32),
        (r"canvas_length|chunk_size", 16),
    )
)
_DEPTHS: Final = ("num_hidden_layers", "n_layers", "num_layers", "layers", "decoder_layers", "depth")
_TEXTS: Final = ("text_config", "thinker_config", "llm_config", "decoder", "vlm_config")
_LEFT: Final = ("id2label", "label2id", "model_type", "per_layer_config", "rope_parameters", "rope_scaling")
_LAYER_NUMBERS: Final = re.compile(
    r".*_index(e)?s|.*_indices|.*_attn_idxs|vision_feature_layers?|.*_target_layers"
)
_TOKENS: Final = re.compile(r".*token_id|.*token_index|.*token_ids|image_patch_id|im_\w+_id")
_SECTIONS: Final = "mrope_section"

OWN: Final[dict[str, Config]] = {
    # equal numbers, ranges of ids that meet
    "apertus1p5": {
        "audio_config.codebook_dim": WIDTH,
        "image_token_offset": 64,
        "audio_token_offset": 128,
    },
    "mistral4": {"head_dim": 16, "qk_nope_head_dim": 8, "qk_head_dim": 16},
    "dots3_note": {"text_config.head_dim": 24},
    # what the default config leaves empty, and the model needs
    "chameleon": {"vocabulary_map": {"<image>": IMAGE}},
    "emu3": {"vocabulary_map": {"<image>": IMAGE}},
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 6, 4]}
        }
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": WIDTH,
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0], [-2, 1]], "downsample_rate": "1/2"},
    "perception_lm": {"vision_config.model_args": {"embed_dim": WIDTH}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": LAST_WORD + 50},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": LAST_WORD + 50},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD_DIM,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 4,
    },
    # kinds of layers that published checkpoints have, and the default config has not
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention", "full_attention"]},
    "idefics2": {"text_config.sliding_window": None},
    "unlimited_ocr": {"text_config.num_key_value_heads": HEADS},
    "step3p7": {
        "text_config.layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "text_config.sliding_window": WINDOW,
    },
}
"""What a type needs beside small sizes: dotted names and values."""


def tiny_config(model_type: str, changes: Config | None = None) -> Any:
    """The default config of a model type with small sizes.

    Args:
        model_type: a key of transformers' `CONFIG_MAPPING`.
        changes: further values by dotted name: `{"text_config.num_kv_shared_layers": 2}`.
    """
    kind = CONFIG_MAPPING[model_type]
    config = kind().to_dict()
    shrink(config)
    for name, value in {**OWN.get(model_type, {}), **(changes or {})}.items():
        *path, last = name.split(".")
        holder = config
        for step in path:
            holder = holder[step]
        holder[last] = value
    return kind.from_dict(config)


def tiny_text(model_type: str) -> Config:
    """The small config of a language model, for the `text_config` of a type that takes any."""
    config: Config = tiny_config(model_type).to_dict()
    return config


def shrink(config: Config) -> None:
    """Cut the sizes of a config's dictionary down; special token ids move into the vocabulary."""
    _shrink(config, itertools.count(LAST_WORD), text="vision_config" not in config)


def _shrink(config: Config, ids: Iterator[int], *, text: bool) -> None:
    kept = _kept_layers(config)
    if kept:
        _cut_layers(config, kept)
    turned, rest = ((config.get(f"qk_{part}_head_dim") or 0) for part in ("rope", "nope"))
    whole = config.get("head_dim") == turned + rest
    for name, value in config.items():
        if name in _LEFT or (kept and name in _DEPTHS) or _is_table(value):
            continue
        if isinstance(value, dict):
            _shrink(value, ids, text=name in _TEXTS)
        else:
            config[name] = _small(name, value, ids)
    for own in (config.get("per_layer_config") or {}).values():
        own.update({name: _size(name, value) * (1 + (name == "head_dim")) for name, value in own.items()})
        _fit_heads(own, text="kv_lora_rank" not in own and text)
    _fit_heads(config, text=text)
    if turned and config.get("head_dim"):  # of latent attention: all of a head, or what is rotated
        config["head_dim"] = config["qk_rope_head_dim"] + (config["qk_nope_head_dim"] if whole else 0)
    _fit_rope(config)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and not all(isinstance(key, str) for key in value)


def _small(name: str, value: Any, ids: Iterator[int]) -> Any:
    if name == "tie_word_embeddings":  # a tied head says the last token again
        return False
    if _TOKENS.fullmatch(name):
        return _token(name, value, ids)
    return _layer_numbers(value) if _LAYER_NUMBERS.fullmatch(name) else _size(name, value)


def _size(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
        return [_size(name, one) for one in value]
    if type(value) is not int:
        return value
    sizes = (size for pattern, size in _SIZES if pattern.fullmatch(name))
    return min(next(sizes, value), value)


def _token(name: str, value: Any, ids: Iterator[int]) -> Any:
    if name.startswith("eos") or (value is None and not name.startswith(("image_token", "video_token"))):
        return None
    if isinstance(value, list):
        return [next(ids) for _ in value]
    fixed = {"pad_": PAD, "bos_": BOS, "image_token": IMAGE, "image_patch": IMAGE, "video_token": VIDEO}
    return next((token for begin, token in fixed.items() if name.startswith(begin)), None) or next(ids)


def _layer_numbers(value: Any) -> Any:
    """Numbers of layers that `DEPTH` layers have, as many as before where they repeat."""
    if isinstance(value, list | tuple):
        return [_layer_numbers(one) for one in value]
    return value if type(value) is not int else max(value, -2) if value < 0 else min(value, DEPTH - 1)


def _depth(config: Config) -> int | None:
    return next((config[name] for name in _DEPTHS if type(config.get(name)) is int), None)


def _kept_layers(config: Config) -> list[int]:
    """Which layers stay: the first of each kind, and as many more as make `DEPTH`."""
    depth = _depth(config)
    if depth is None:
        return []
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == depth and not _counts(v)]
    own = {int(index): value for index, value in (config.get("per_layer_config") or {}).items()}
    shared = config.get("num_kv_shared_layers") or 0
    kinds = [(i >= depth - shared, str(own.get(i)), *(str(v[i]) for v in lists)) for i in range(depth)]
    kept = sorted({kinds.index(kind) for kind in kinds})
    rest = (index for index in range(depth) if index not in kept)
    kept += itertools.islice(rest, max(0, DEPTH - len(kept)))
    if shared:
        config["num_kv_shared_layers"] = sum(index >= depth - shared for index in kept)
    return sorted(kept)


def _counts(value: list[Any]) -> bool:
    """Whether a list numbers the layers."""
    return value == list(range(len(value)))


def _cut_layers(config: Config, kept: list[int]) -> None:
    depth = _depth(config)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == depth:
            config[name] = list(range(len(kept))) if _counts(value) else [value[index] for index in kept]
        elif name in _DEPTHS and value == depth:
            config[name] = len(kept)
    own = {int(index): value for index, value in (config.get("per_layer_config") or {}).items()}
    if own:
        config["per_layer_config"] = {new: own[old] for new, old in enumerate(kept) if old in own}


def _fit_heads(config: Config, *, text: bool) -> None:
    """As many KV heads as heads where a type needs it: latent attention and vision towers."""
    for name in [name for name in config if name.endswith("num_key_value_heads")]:
        if config[name] is not None and (not text or "kv_lora_rank" in config):
            config[name] = config.get("num_attention_heads", HEADS)
    if text and "head_dim" in config and config["head_dim"] is None:
        config["head_dim"] = HEAD_DIM


def _fit_rope(config: Config) -> None:
    """Sections of multi-axis RoPE add up to half of what is rotated."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    head = config.get("head_dim") or HEAD_DIM
    for one in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        if one and "rope_theta" in one:
            rotated = config.get("qk_rope_head_dim") or int(head * (one.get("partial_rotary_factor") or 1.0))
            one[_SECTIONS] = _portions(rotated // 2)


def _portions(total: int) -> list[int]:
    side = max(1, total * 3 // 8)
    return [side, side, total - 2 * side] if total > 2 * side else [total - 2, 1, 1]
