"""Small random models of further families, as `models` has them of LLaVA and Qwen2.5-VL.

What a family does with pictures is there in small: tiles and newline tokens, grids of any size,
several features a picture, sliding layers, pictures and prefixes that attend both ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from avlprof.models.placement import keep_soft_cap
from avlprof.testing.models import (
    BOS,
    IMAGE,
    VIDEO,
    VOCABULARY,
    TinyCase,
    finished,
    image_types,
    sunk,
)
from avlprof.testing.pixels import (
    any_size,
    flat_frames,
    flat_patches,
    frames_as_pictures,
    square_frames,
    squares,
    tiles,
)

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 3
WIDTH = HEADS * HEAD_DIM
PATCH = 4
WINDOW = 12  # tokens that a sliding layer sees: fewer than any prompt has
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def random_llava_next(seed: int = 0) -> TinyCase:
    """Tiles of a picture, and a learned newline token behind each row of them."""
    tile = 3 * PATCH
    config = hf.LlavaNextConfig(
        text_config=hf.MistralConfig(**_text(), sliding_window=None),
        vision_config=_tower(hf.CLIPVisionConfig, tile),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[tile, 2 * tile], [2 * tile, tile]],
    )
    model = finished(hf.LlavaNextForConditionalGeneration, config, seed)
    return TinyCase("llava_next", model, (IMAGE,), tiles(tile, PATCH))


def random_llava_onevision(seed: int = 0) -> TinyCase:
    """Tiles and newline tokens over a SigLIP tower."""
    tile = 3 * PATCH
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**_text()),
        vision_config=_tower(hf.SiglipVisionConfig, tile),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[tile, 2 * tile], [2 * tile, tile]],
    )
    model = finished(hf.LlavaOnevisionForConditionalGeneration, config, seed)
    films = square_frames(tile, tokens=4)
    return TinyCase("llava_onevision", model, (IMAGE, VIDEO), tiles(tile, PATCH), videos=films)


def random_vipllava(seed: int = 0) -> TinyCase:
    """Features of several layers of the tower, side by side."""
    new, old = "vision_feature_layer", "vision_feature_layers"  # renamed after transformers 5.17
    name = new if new in inspect.signature(hf.VipLlavaConfig).parameters else old
    config = hf.VipLlavaConfig(
        text_config=hf.LlamaConfig(**_text()),
        vision_config=_tower(hf.CLIPVisionConfig, 5 * PATCH),
        image_token_index=IMAGE,
        image_seq_length=25,
        **{name: [-1, -2]},
    )
    model = finished(hf.VipLlavaForConditionalGeneration, config, seed)
    return TinyCase("vipllava", model, (IMAGE,), squares(5 * PATCH, 25))


def random_qwen2_vl(seed: int = 0) -> TinyCase:
    """Grids of any size, multi-axis RoPE."""
    vision = {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": WIDTH}
    return _qwen("qwen2_vl", hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, vision, seed)


def random_qwen3_vl(seed: int = 0) -> TinyCase:
    """Grids of any size, interleaved multi-axis RoPE, vision features added in the first layers too."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    }
    return _qwen("qwen3_vl", hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig, vision, seed)


def random_glm4v(seed: int = 0) -> TinyCase:
    """Grids of any size, multi-axis RoPE; frames of a video have the id of images."""
    merge = 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = hf.Glm4vConfig(
        text_config=_text() | {"rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": 8 * PATCH,
            "patch_size": PATCH,
            "spatial_merge_size": merge,
            "out_hidden_size": WIDTH,
            "intermediate_size": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        video_start_token_id=VOCABULARY - 1,
        video_end_token_id=VOCABULARY - 2,
    )
    model = finished(hf.Glm4vForConditionalGeneration, config, seed)
    together = int(config.vision_config.temporal_patch_size)
    frames = flat_frames(PATCH, merge, together, between=True, token=IMAGE)

    def videos(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, tensors = frames(count, generator)
        return [[VOCABULARY - 1, *one, VOCABULARY - 2] for one in ids], tensors

    def types(ids: Tensor) -> dict[str, Tensor]:
        inside = (ids == VOCABULARY - 1).cumsum(dim=1) > (ids == VOCABULARY - 2).cumsum(dim=1)
        return {"mm_token_type_ids": (ids == IMAGE).long() * (1 + inside.long())}

    return TinyCase("glm4v", model, (IMAGE, VIDEO), flat_patches(PATCH, merge, together), types, videos)


def random_internvl(seed: int = 0) -> TinyCase:
    """One square of merged patches a tile, one or three tiles a picture, one a frame."""
    return _internvl("internvl", hf.Qwen2Config(**_text()), seed)


def random_internvl_gpt_oss(seed: int = 0) -> TinyCase:
    """Learned attention sinks, in sliding layers and a full one."""
    return _internvl("internvl_gpt_oss", hf.GptOssConfig(**_text() | sunk(SLIDING, WINDOW)), seed)


def random_idefics3(seed: int = 0) -> TinyCase:
    """Sub-images that are merged by a pixel shuffle."""
    return _idefics("idefics3", hf.Idefics3ForConditionalGeneration, hf.Idefics3Config, seed)


def random_smolvlm(seed: int = 1) -> TinyCase:
    """As Idefics3, and frames of videos, a part each."""
    case = _idefics("smolvlm", hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig, seed)
    return replace(case, videos=frames_as_pictures(6 * PATCH, 9, nested=True))


def random_mistral3(seed: int = 0) -> TinyCase:
    """A Pixtral tower: pictures of any size, patches merged two by two."""
    merge = 2
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**_text(), sliding_window=None),
        vision_config=hf.PixtralVisionConfig(**_tower_sizes(16 * PATCH), head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=merge,
        tie_word_embeddings=False,
    )

    model = finished(hf.Mistral3ForConditionalGeneration, config, seed)
    return TinyCase("mistral3", model, (IMAGE,), any_size(merge * PATCH))


def random_aya_vision(seed: int = 0) -> TinyCase:
    """Cohere2: sliding layers with RoPE, full layers without positions."""
    config = hf.AyaVisionConfig(
        text_config=hf.Cohere2Config(**_text(), sliding_window=WINDOW, layer_types=SLIDING, logit_scale=1.0),
        vision_config=_tower(hf.SiglipVisionConfig, 8 * PATCH),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    model = finished(hf.AyaVisionForConditionalGeneration, config, seed)
    return TinyCase("aya_vision", model, (IMAGE,), squares(8 * PATCH, 16))


def random_gemma3(seed: int = 0) -> TinyCase:
    """Sliding layers; the tokens of one picture attend to each other both ways."""
    text = hf.Gemma3TextConfig(
        **_text(), sliding_window=WINDOW, layer_types=SLIDING, query_pre_attn_scalar=HEAD_DIM // 4
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=_tower(hf.SiglipVisionConfig, 8 * PATCH),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        tie_word_embeddings=False,
    )
    model = finished(hf.Gemma3ForConditionalGeneration, config, seed)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    nn.init.normal_(  # the library leaves it at zero, which would make all pictures alike
        projection, std=projection.shape[0] ** -0.5, generator=torch.Generator().manual_seed(seed)
    )
    pixels = squares(8 * PATCH, 16)
    return TinyCase("gemma3", model, (IMAGE,), pixels, image_types("token_type_ids"))


def random_paligemma(seed: int = 0) -> TinyCase:
    """Gemma: the whole prompt attends both ways."""
    return _paligemma("paligemma", hf.GemmaConfig(**_text()), seed)


def random_paligemma2(seed: int = 0) -> TinyCase:
    """Gemma 2: the same with sliding layers and soft-capped logits, which run in eager attention."""
    text = hf.Gemma2Config(
        **_text(),
        sliding_window=WINDOW,
        layer_types=SLIDING,
        query_pre_attn_scalar=HEAD_DIM,
        attn_logit_softcapping=4.0,
    )
    return _paligemma("paligemma2", text, seed)


def families() -> list[tuple[str, Callable[[], TinyCase]]]:
    """Name and builder of each: a matrix of tests beside `models.cases`."""
    return [
        ("llava_next", random_llava_next),
        ("vipllava", random_vipllava),
        ("llava_onevision", random_llava_onevision),
        ("qwen2_vl", random_qwen2_vl),
        ("qwen3_vl", random_qwen3_vl),
        ("glm4v", random_glm4v),
        ("internvl", random_internvl),
        ("internvl_gpt_oss", random_internvl_gpt_oss),
        ("idefics3", random_idefics3),
        ("smolvlm", random_smolvlm),
        ("mistral3", random_mistral3),
        ("aya_vision", random_aya_vision),
        ("gemma3", random_gemma3),
        ("paligemma", random_paligemma),
        ("paligemma2", random_paligemma2),
    ]


def _text() -> dict[str, Any]:
    """Sizes of a language model."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def _tower_sizes(side: int) -> dict[str, Any]:
    """Sizes of a vision tower for pictures of `side` x `side` pixels."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": PATCH,
    }


def _tower(kind: Any, side: int) -> Any:
    return kind(**_tower_sizes(side), **({"vision_use_head": False} if "Siglip" in kind.__name__ else {}))


def _qwen(name: str, kind: Any, config_kind: Any, vision: dict[str, Any], seed: int) -> TinyCase:
    merge = 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = config_kind(
        text_config=_text() | {"rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": merge} | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VOCABULARY - 1,
        vision_end_token_id=VOCABULARY - 2,
    )

    model = finished(kind, config, seed)
    together = int(config.vision_config.temporal_patch_size)
    pixels = flat_patches(PATCH, merge, together)
    films = flat_frames(PATCH, merge, together, between=name == "qwen3_vl")
    return TinyCase(name, model, (IMAGE, VIDEO), pixels, image_types("mm_token_type_ids"), films)


def _idefics(name: str, kind: Any, config_kind: Any, seed: int) -> TinyCase:
    text, vision = hf.LlamaConfig(**_text()), _tower_sizes(6 * PATCH)
    config = config_kind(text_config=text, vision_config=vision, image_token_id=IMAGE)
    pixels = squares(6 * PATCH, 9, most=3, nested=True)
    return TinyCase(name, finished(kind, config, seed), (IMAGE,), pixels)


def _internvl(name: str, text: Any, seed: int) -> TinyCase:
    side = 6 * PATCH
    config = hf.InternVLConfig(
        text_config=text,
        vision_config=hf.InternVLVisionConfig(**_tower_sizes(side)),
        image_token_id=IMAGE,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    model = finished(hf.InternVLForConditionalGeneration, config, seed)
    return TinyCase(name, model, (IMAGE,), squares(side, 9, most=3), videos=frames_as_pictures(side, 9))


def _paligemma(name: str, text: Any, seed: int) -> TinyCase:
    config = hf.PaliGemmaConfig(
        text_config=text,
        vision_config=_tower(hf.SiglipVisionConfig, 5 * PATCH),
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    model = finished(hf.PaliGemmaForConditionalGeneration, config, seed)
    keep_soft_cap(model)
    pixels = squares(5 * PATCH, 25)
    return TinyCase(name, model, (IMAGE,), pixels, lambda ids: {"token_type_ids": torch.zeros_like(ids)})
