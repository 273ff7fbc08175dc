"""The folder of the model `small`, from its language model and what was trained beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from avlprof.errors import UserError
from avlprof.models.load import quiet_transformers
from avlprof.models.small.deltas import load_deltas, merged
from avlprof.models.small.language import LanguageModel
from avlprof.watch import SILENT, Watch

END, IMAGE, PAD = "<|im_end|>", "<image>", "<|endoftext|>"
BEGIN: Final = "<|im_start|>"
IMAGE_ID: Final = 4
"""An id that the language model never used, `<reponame>`."""

_CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}\
{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def assemble(gguf: Path, deltas: Path, folder: Path, watch: Watch = SILENT) -> None:
    """Write a LLaVA that the Auto classes of transformers load: fp16 weights, configs and processor.

    Args:
        gguf: the language model.
        deltas: tower, projector and low-rank changes, as `avlprof.models.small.deltas` has them.
        folder: is made if missing.
        watch: sees three steps.

    Raises:
        UserError: the deltas cannot be read, or do not fit the language model.
    """
    watch.phase("assemble", 0, 3)
    changes, about = load_deltas(deltas)
    language = LanguageModel(gguf)
    try:
        weights = merged(language.weights(), changes)
        model = _to_save(model_config(language, about), weights)
    except (KeyError, RuntimeError) as error:
        what = " ".join(str(error).split())[:160]
        raise UserError(f"deltas {deltas} do not fit the language model: {what}") from None
    watch.phase("assemble", 1, 3)
    with quiet_transformers(progress=False):
        model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # CPUs are slow in 16 bits, and this is where the model is run mostly
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    watch.phase("assemble", 2, 3)
    build_processor(language, about).save_pretrained(folder)
    watch.phase("assemble", 3, 3)


def model_config(language: LanguageModel, about: dict[str, Any]) -> LlavaConfig:
    """The config of the whole, from the language model's and what the deltas say of the tower."""
    vision = CLIPVisionConfig(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-5, **about["vision"])
    text = LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **language.config())
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=True,
    )


def _to_save(config: LlavaConfig, weights: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """A model of these weights in fp16, to be saved: what is not saved with it is empty.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    width = config.vision_config.hidden_size
    unused = {
        "weight": torch.ones(width),
        "bias": torch.zeros(width),
    }  # LLaVA reads the tower before this norm
    state = weights | {f"model.vision_tower.post_layernorm.{name}": value for name, value in unused.items()}
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.load_state_dict({name: tensor.half() for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False
    )
    return model


def build_processor(language: LanguageModel, about: dict[str, Any]) -> LlavaProcessor:
    """Tokenizer and picture processor; pictures are cut to a square in the middle."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=language.tokenizer({IMAGE_ID: IMAGE}),
        bos_token=BEGIN,
        eos_token=END,
        unk_token=PAD,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=language.config()["max_position_embeddings"],
        extra_special_tokens={"image_token": IMAGE},
    )
    side = about["vision"]["image_size"]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[about["mean"]] * 3,
        image_std=[about["std"]] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=about["vision"]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
