"""Run by the interpreter of kvpress's own environment: exported files on small random models.

`python kvpress_side.py FOLDER` reads FOLDER/jobs.json, `[{name, model}]` with FOLDER/<name>.py beside it,
and writes the weights of each model, and of each job the logits and how many tokens each layer holds.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

STEPS = 4
LAYERS = 6
IMAGE, BEGIN, END = 190, 191, 192


def small_model(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=8,
            num_key_value_heads=2, head_dim=8, vocab_size=99,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    text = Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=199, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56,
        patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=BEGIN, eoi_token_index=END,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def small_prompt(kind):
    """Two prompts of one length; Gemma's have two pictures each, and text before, between and behind."""
    random = torch.Generator().manual_seed(3)
    if kind == "llama":
        ids = torch.randint(0, 99, (2, 37), generator=random)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before, between, behind = (torch.randint(0, 189, (2, n), generator=random) for n in (3, 4, 5))
    picture = torch.tensor([BEGIN] + [IMAGE] * 4 + [END]).expand(2, -1)
    ids = torch.cat([before, picture, between, picture, behind], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(4, 3, 56, 56, generator=random),
    }


def logits_of(model, prompt, **options):
    """Logits `[B, STEPS, V]` of a greedy answer."""
    found = model.generate(
        **prompt, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return torch.stack(found.logits, dim=1)


def exported(path):
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def main(folder):
    models = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        kind = job["model"]
        if kind not in models:
            models[kind] = small_model(kind)
            weights = {name: tensor.clone() for name, tensor in models[kind].state_dict().items()}
            save_file(weights, folder / f"{kind}.safetensors")
        model = models[kind]
        cache = DynamicCache(config=model.config.get_text_config())
        with exported(folder / f"{job['name']}.py").policy_press()(model):
            logits = logits_of(model, small_prompt(kind), past_key_values=cache)
        held = torch.tensor([layer.keys.shape[2] for layer in cache.layers])
        save_file({"logits": logits.contiguous(), "held": held}, folder / f"{job['name']}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
