"""The embedded model's training: resumes exactly, and exports what the Auto classes load."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from avlprof.tasks.shapes.scene import render, sample_scene
from tools.tiny_model.muon import orthogonalised
from tools.tiny_model.packing import Packer, collate
from tools.tiny_model.train import Stage, Trainer


def trained(work, name, *stops):
    """A trainer after a stage of 4 steps, with a new process at each of `stops` (in images)."""
    for stop in (*stops, None):
        trainer = Trainer(work, seed=3)
        trainer.run(Stage(name, images=8, batch=2, adam_lr=1e-3, muon_lr=5e-3, warmup=2, until=stop))
    return trainer


@pytest.mark.slow  # trains a model twice
@pytest.mark.parametrize("name", ["tower", "joint"])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path, name):
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole, parts = trained(tmp_path / "whole", name), trained(tmp_path / "parts", name, 2, 6)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, msg=key)
    fresh = Trainer(tmp_path, seed=3)
    moved = [
        key
        for key, value in whole.model.state_dict().items()
        if not torch.equal(value, fresh.model.state_dict()[key])
    ]
    assert moved


def test_the_export_loads_without_the_package(tmp_path):
    trainer = Trainer(tmp_path, seed=1)
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


def test_a_packed_segment_is_an_ordinary_prompt(tmp_path):
    """Loss positions of a segment see the logits of the same question asked alone."""
    trainer = Trainer(tmp_path, seed=2)
    packer = Packer(trainer.processor, 196, 400)
    scene = sample_scene((4, 4))
    packed = packer(scene, np.random.default_rng(0))
    batch = collate([packed], trainer.processor.tokenizer.pad_token_id)
    image = trainer.processor.image_processor([render(scene)], return_tensors="pt")["pixel_values"]
    inner = trainer.model.eval().model
    vision = inner.multi_modal_projector(trainer.features(image))

    def hidden(ids, **options):
        embeds = inner.get_input_embeddings()(ids)
        at = (ids == trainer.model.config.image_token_id)[..., None]
        return inner.language_model(
            inputs_embeds=embeds.masked_scatter(at, vision), use_cache=False, **options
        )[0]

    with torch.no_grad():
        together = hidden(batch["ids"], position_ids=batch["positions"], attention_mask=batch["mask"])[0]
        segments = torch.tensor(packed.segments)
        for segment in (1, int(segments.max())):
            own = ((segments == 0) | (segments == segment)).nonzero()[:, 0]
            alone = hidden(batch["ids"][:, own])[0]
            torch.testing.assert_close(together[own], alone, atol=1e-4, rtol=1e-4)


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
