"""The embedded model's training: resumes exactly, and exports what the Auto classes load."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from avlprof.models.families.tiny import PictureProcessor
from avlprof.models.tiny import WEIGHTS
from avlprof.tasks.shapes.scene import Frame, render, sample_scene
from tools.tiny_model import mrope
from tools.tiny_model.build import LlavaRecipe
from tools.tiny_model.mrope import MropeRecipe
from tools.tiny_model.muon import orthogonalised
from tools.tiny_model.packing import collate, pack
from tools.tiny_model.train import Stage, Trainer

RECIPES = [pytest.param(LlavaRecipe, id="tiny"), pytest.param(MropeRecipe, id="tiny-mrope")]


def trained(work, recipe, name, *stops):
    """A trainer after a stage of 4 steps, with a new process at each of `stops` (in images)."""
    for stop in (*stops, None):
        trainer = Trainer(work, recipe(), seed=3)
        trainer.run(Stage(name, images=8, batch=2, adam_lr=1e-3, muon_lr=5e-3, warmup=2, until=stop))
    return trainer


@pytest.mark.slow  # trains a model twice
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["tower", "joint"])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path, recipe, name):
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = trained(tmp_path / "whole", recipe, name)
    parts = trained(tmp_path / "parts", recipe, name, 2, 6)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, msg=key)
    fresh = Trainer(tmp_path, recipe(), seed=3)
    moved = [
        key
        for key, value in whole.model.state_dict().items()
        if not torch.equal(value, fresh.model.state_dict()[key])
    ]
    assert moved


def test_the_export_loads_without_the_package(tmp_path):
    trainer = Trainer(tmp_path, LlavaRecipe(), seed=1)
    trainer.export(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    message = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is at the top?"}]}
    ]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[render(sample_scene((9, 9)))], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 196
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_export_of_tiny_mrope_has_stock_names_and_loads(tmp_path):
    trainer = Trainer(tmp_path, MropeRecipe(), seed=1)
    trainer.export(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value.half().float(), rtol=0, atol=0)
    config = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    assert config["processor_class"] == "Qwen2_5_VLProcessor"
    for part in ("image_processor", "video_processor"):
        assert (config[part]["patch_size"], config[part]["merge_size"]) == (8, 1)
    processor = PictureProcessor.from_pretrained(tmp_path / "model")
    prompt = "USER: <|vision_start|><|image_pad|><|vision_end|>\nlist the colors. ASSISTANT:"
    picture = render(sample_scene((9, 9), frame=Frame(160, 96)))
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 20 * 12
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_tiny_mrope_starts_from_tiny(monkeypatch):
    """The decoder's weights are `tiny`'s; the fitted projector is the least-squares answer."""
    monkeypatch.setattr(mrope, "_SETTLING", 6)
    recipe = MropeRecipe()
    model = recipe.build_model(seed=4)
    theirs = load_file(WEIGHTS / "model.safetensors")
    own = model.model.language_model.state_dict()
    shared = [name for name in own if f"language_model.model.{name}" in theirs]
    assert len(shared) == 6 * 9 + 2
    for name in shared:
        value = theirs[f"language_model.model.{name}"].float()
        torch.testing.assert_close(own[name][: len(value)], value)
    assert all(not own[name].any() for name in own if name.endswith("_proj.bias"))
    recipe.settle(model)
    pictures = [render(sample_scene((0, 1, 2, number))) for number in range(6)]
    llava = LlavaRecipe()
    with torch.no_grad():
        wanted = 0.3 * llava.projected(recipe.teacher, llava.features(recipe.teacher, llava.pixels(pictures)))
        features = recipe.features(model, recipe.pixels(pictures))
        merger = model.model.visual.merger
        hidden = torch.nn.functional.gelu(merger.mlp[0](merger.ln_q(features)))
        error = (recipe.projected(model, features) - wanted).flatten(0, 1)
    # what a least-squares fit leaves is orthogonal to what it was fitted from
    left = hidden.flatten(0, 1).double().T @ error.double()
    assert left.abs().max() < 1e-4 * wanted.abs().sum()
    assert error.var() < 0.95 * wanted.flatten(0, 1).var()


@pytest.mark.parametrize(
    ("recipe", "frame"),
    [
        (LlavaRecipe, Frame()),
        (MropeRecipe, Frame()),
        (MropeRecipe, Frame(88, 136)),
        (MropeRecipe, Frame(96, 80, 0.8)),
    ],
)
def test_a_packed_segment_is_an_ordinary_prompt(tmp_path, recipe, frame):
    """Answers' logits in a packed sequence are those of the stock model given one prompt alone."""
    trainer = Trainer(tmp_path, recipe(), seed=2)
    own, model = trainer.recipe, trainer.model.eval()
    scene = sample_scene((4, 4), frame=frame)
    packed = pack(scene, own, np.random.default_rng(0))
    batch = collate([packed], own.processor.tokenizer.pad_token_id)
    picture = render(scene)
    assert picture.size == (frame.width, frame.height)
    text = "USER: <image>" if recipe is LlavaRecipe else "USER: <|vision_start|><|image_pad|><|vision_end|>"
    stock = dict(own.processor(text=[text], images=[picture], return_tensors="pt"))
    with torch.no_grad():
        vision = own.projected(model, own.features(model, own.pixels([picture])))
        inner, ids = model.model, batch["ids"]
        at = (ids == model.config.image_token_id)[..., None]
        together = inner.language_model(
            inputs_embeds=inner.get_input_embeddings()(ids).masked_scatter(at, vision),
            position_ids=batch["positions"] if len(batch["positions"]) > 1 else batch["positions"][0],
            attention_mask=batch["mask"],
            use_cache=False,
        )[0]
        segments = torch.tensor(packed.segments)
        prefix = int((segments == 0).sum())
        assert ids[0, :prefix].tolist() == stock["input_ids"][0].tolist()
        for segment in (1, int(segments.max())):
            own_ids = ((segments == 0) | (segments == segment)).nonzero()[:, 0]
            prompt = stock | {"input_ids": ids[:, own_ids], "attention_mask": torch.ones(1, len(own_ids))}
            if "mm_token_type_ids" in stock:
                extra = torch.zeros(1, len(own_ids) - prefix, dtype=torch.long)
                prompt["mm_token_type_ids"] = torch.cat([stock["mm_token_type_ids"], extra], dim=1)
            alone = model(**prompt).logits[0]
            torch.testing.assert_close(model.lm_head(together[0, own_ids]), alone, atol=2e-3, rtol=1e-3)


def test_orthogonalised_is_close_to_the_nearest_orthogonal_matrix():
    """The polar factor U V^T of the singular value decomposition is the nearest one."""
    torch.manual_seed(0)
    for shape in ((3, 24, 24), (2, 12, 40), (2, 40, 12)):
        matrices = torch.randn(shape)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        nearest, found = left @ right, orthogonalised(matrices)
        likeness = torch.cosine_similarity(found.flatten(1), nearest.flatten(1))
        assert likeness.min() > 0.95
        assert torch.linalg.svdvals(found).max() < 1.3
