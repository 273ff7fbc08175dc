"""The recipe of `tiny-mrope`: Qwen2.5-VL in small, started from the weights of `tiny`.

Patches of 8 px are tokens (no merging), so a picture of 112 px has the same 14 x 14 tokens as with
`tiny`. The decoder starts as `tiny`'s: the two differ in biases of q, k and v, which start at 0, and in
positions. The tower starts from nothing: it learns what each patch shows and, on pictures of 112 px,
to give what `tiny`'s projector gives, so that the decoder understands it from the first step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from avlprof.files import write_text
from avlprof.models.families.tiny import PictureProcessor
from avlprof.models.tiny import WEIGHTS
from avlprof.tasks.shapes.scene import IMAGE_SIZE, PATCH_SIZE, Frame, render, sample_scene
from tools.tiny_model.build import LlavaRecipe
from tools.tiny_model.recipe import Prefix, Recipe

_SETTLING = 192  # pictures to which the projector is fitted
_VOLUME = 0.3  # size of a picture's embeddings beside `tiny`'s, so that the decoder can add positions
_AXES = [*[1] * 14, 2]  # time, height and width take turns, so that each has fast and slow frequencies
SIDES = (80, 168)  # pixels of the smallest and the largest side
_IMAGE, _START, _END, _VIDEO = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
_CHAT_TEMPLATE = """{% for m in messages %}{% if m['role'] == 'user' %}USER: \
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}\
{% else %} ASSISTANT: {% if m['content'] is string %}{{ m['content'] }}{% else %}\
{{ m['content'][0]['text'] }}{% endif %}</s>{% endif %}{% endfor %}\
{% if add_generation_prompt %} ASSISTANT:{% endif %}"""


class MropeRecipe(Recipe):
    """Qwen2.5-VL: dynamic resolution, windows in every other block of the tower, positions of three axes."""

    def build_processor(self) -> PictureProcessor:
        tokenizer = _tokenizer()
        images = Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE,
            merge_size=1,
            temporal_patch_size=2,
            size={"shortest_edge": SIDES[0] ** 2, "longest_edge": SIDES[1] ** 2},
        )
        return PictureProcessor(images, tokenizer, chat_template=_CHAT_TEMPLATE)

    def build_model(self, seed: int) -> Qwen2_5_VLForConditionalGeneration:
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(self.processor.tokenizer))
        tokenizer = self.processor.tokenizer
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )
        _init_tower(model)
        _start_from(model, self.teacher)
        return model

    def __init__(self) -> None:
        super().__init__()
        teacher = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32)
        self.teacher: LlavaForConditionalGeneration = teacher.eval().requires_grad_(False)
        self._llava = LlavaRecipe()

    def tower(self, model: PreTrainedModel) -> nn.Module:
        return nn.ModuleList([model.model.visual.patch_embed, model.model.visual.blocks])

    def features(self, model: PreTrainedModel, pixels: Mapping[str, Tensor]) -> Tensor:
        visual, grids = model.model.visual, pixels["image_grid_thw"]
        hidden = visual(pixels["pixel_values"], grid_thw=grids).last_hidden_state
        order, _ = get_vision_window_index(grids, 1, visual.window_size, visual.patch_size)
        ordered: Tensor = hidden[torch.argsort(order)]
        return ordered.view(len(grids), -1, hidden.shape[-1])

    def projected(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        merged: Tensor = model.model.visual.merger(features)
        return merged.view(*features.shape[:2], -1)

    def prefix(self, frame: Frame) -> Prefix:
        ids = self.picture_ids(f"USER: {_START}", _IMAGE, _END, frame)
        token = self.processor.tokenizer.convert_tokens_to_ids(_IMAGE)
        first, patches = ids.index(token), ids.count(token)
        rows, columns = frame.height // PATCH_SIZE, frame.width // PATCH_SIZE
        positions = torch.arange(len(ids)).repeat(3, 1)
        positions[0, first : first + patches] = first
        positions[1, first : first + patches] = first + torch.arange(patches) // columns
        positions[2, first : first + patches] = first + torch.arange(patches) % columns
        after = len(ids) - first - patches
        following = first + max(rows, columns) + torch.arange(after)
        positions[:, first + patches :] = following
        return Prefix(ids, positions, first + max(rows, columns) + after)

    def frame(self, rng: np.random.Generator) -> Frame:
        """Half of the steps as the task draws, a quarter in other sides, a quarter rescaled."""
        kind = rng.random()
        if kind < 0.5:
            return Frame()
        if kind < 0.75:
            width, height = (PATCH_SIZE * int(n) for n in rng.integers(11, 22, size=2))
            return Frame(width, height)
        side = PATCH_SIZE * int(rng.integers(SIDES[0] // PATCH_SIZE, 20))
        return Frame(side, side, side / IMAGE_SIZE)

    def settle(self, model: PreTrainedModel) -> None:
        """Fit the projector to give what `tiny`'s gives for the same pictures, by least squares."""
        merger = model.model.visual.merger
        scenes = [sample_scene((0, 1, 2, number)) for number in range(_SETTLING)]
        pictures = [render(scene) for scene in scenes]
        with torch.no_grad():
            taught = [
                self._llava.projected(
                    self.teacher, self._llava.features(self.teacher, self._llava.pixels(some))
                )
                for some in batched(pictures, 32)
            ]
            features = torch.cat([self.features(model, self.pixels(some)) for some in batched(pictures, 32)])
            hidden = merger.mlp[1](merger.mlp[0](merger.ln_q(features))).flatten(0, 1)
            design = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1).double()
            found = torch.linalg.lstsq(design, torch.cat(taught).flatten(0, 1).double() * _VOLUME).solution
            merger.mlp[2].weight.copy_(found[:-1].T)
            merger.mlp[2].bias.copy_(found[-1])

    def save_processor(self, folder: Path) -> None:
        """Under the names of the stock processor, which `AutoProcessor` builds where torchvision is."""
        super().save_processor(folder)
        for name in ("processor_config.json", "tokenizer_config.json"):
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            config["processor_class"] = "Qwen2_5_VLProcessor"
            if pictures := config.get("image_processor"):
                films = {key: value for key, value in pictures.items() if key != "image_processor_type"}
                config["video_processor"] = films | {"video_processor_type": "Qwen2VLVideoProcessor"}
            write_text(folder / name, json.dumps(config, indent=2, sort_keys=True) + "\n")


def batched(pictures: Sequence[Image.Image], size: int) -> Iterator[Sequence[Image.Image]]:
    """The pictures in runs of `size`."""
    return (pictures[start : start + size] for start in range(0, len(pictures), size))


def _tokenizer() -> PreTrainedTokenizerFast:
    """`tiny`'s tokens under the names of Qwen2.5-VL, and three more behind them."""
    tokenizer: PreTrainedTokenizerFast = LlavaRecipe().processor.tokenizer
    tokenizer.add_tokens([_START, _END, _IMAGE, _VIDEO], special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": _IMAGE, "video_token": _VIDEO},
        padding_side="left",
        model_max_length=1024,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    at = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": _AXES},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 336,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 1,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 192,
        },
        image_token_id=at(_IMAGE),
        video_token_id=at(_VIDEO),
        vision_start_token_id=at(_START),
        vision_end_token_id=at(_END),
        tie_word_embeddings=True,
    )


def _init_tower(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """A wide patch convolution, the same for both frames of a pair, as for `tiny`."""
    weight = model.model.visual.patch_embed.proj.weight
    with torch.no_grad():
        torch.nn.init.normal_(weight, std=0.025)
        weight[:, :, 1] = weight[:, :, 0]
        torch.nn.init.orthogonal_(model.model.visual.merger.mlp[0].weight)


def _start_from(model: Qwen2_5_VLForConditionalGeneration, teacher: LlavaForConditionalGeneration) -> None:
    """Copy `tiny`'s decoder: every weight of the same name, the shared part of the embeddings."""
    own = model.model.language_model.state_dict()
    with torch.no_grad():
        for name, value in teacher.model.language_model.state_dict().items():
            own[name][: len(value)] = value
        for name, value in own.items():
            if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                value.zero_()
