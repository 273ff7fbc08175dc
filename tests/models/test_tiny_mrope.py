"""The embedded `tiny-mrope`: pictures of any size, its prompts, and runtime and recorder on it."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

import avlprof
from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.models import ALIASES, load_model
from avlprof.models.tiny import FOLDERS, MROPE_WEIGHTS
from avlprof.policy import Policy
from avlprof.tasks import load_task
from avlprof.tasks.shapes.scene import Frame, render, sample_scene
from avlprof.tracing import RecordOptions, record
from tests.eager_rows import VISION, codes
from tests.helpers import generate
from tests.oracle import NEAR_TIE, Oracle
from tools.tiny_model.mrope import SIDES, MropeRecipe

PATCH = 8
MOST_BYTES = 7 << 20


@pytest.fixture(scope="module")
def loaded(one_thread):
    return load_model("tiny-mrope", device="cpu")


def drawn(number, width=112, height=112, zoom=1.0):
    return render(sample_scene((5, 5, number), frame=Frame(width, height, zoom)))


def test_it_is_the_stock_model_in_a_small_folder(loaded):
    assert type(loaded.model) is Qwen2_5_VLForConditionalGeneration
    assert loaded.model.dtype == torch.float32
    assert (loaded.adapter.heads, loaded.adapter.kv_heads, loaded.adapter.layers) == (6, 2, 6)
    assert loaded.source == "tiny-mrope"
    assert ALIASES["tiny-mrope"].family == loaded.adapter.family
    assert sum(file.stat().st_size for file in MROPE_WEIGHTS.iterdir()) < MOST_BYTES
    assert set(FOLDERS) == {"tiny", "tiny-mrope"}


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((112, 112), (14, 14)),
        ((168, 88), (11, 21)),
        ((88, 168), (21, 11)),
        ((84, 84), (10, 10)),  # 10.5 patches: to the even number
        ((84, 92), (12, 10)),
        ((40, 40), (10, 10)),
        ((640, 480), None),
        ((90, 700), None),
    ],
)
def test_a_grid_follows_the_pictures_size(loaded, size, grid):
    """Inside the limits the nearest patches; outside the shape of the picture in the nearest area."""
    picture = Image.new("RGB", size, (240, 240, 240))
    batch = loaded.adapter.encode(["list the colors."], [[picture]])
    layout = loaded.adapter.image_layout(batch)
    tile = layout.tiles[0]
    assert (
        int(loaded.adapter.vision_mask(batch["input_ids"]).sum()) == layout.tokens == tile.rows * tile.columns
    )
    if grid is not None:
        assert (tile.rows, tile.columns) == grid
    else:
        area = (tile.rows * PATCH) * (tile.columns * PATCH)
        assert SIDES[1] ** 2 * 0.75 < area <= SIDES[1] ** 2
        assert abs(math.log(tile.columns / tile.rows * size[1] / size[0])) < 0.3


def test_a_prompt_is_the_one_of_training(loaded):
    recipe = MropeRecipe()
    for frame in (Frame(), Frame(168, 88), Frame(80, 80, 0.7)):
        picture = render(sample_scene((5, 6), frame=frame))
        batch = loaded.adapter.encode(["describe the image."], [[picture]])
        ids, prefix = batch["input_ids"][0].tolist(), recipe.prefix(frame)
        assert tuple(ids[: len(prefix.ids)]) == prefix.ids
        asked = loaded.processor.tokenizer("\ndescribe the image. ASSISTANT:", add_special_tokens=False)
        assert ids[len(prefix.ids) :] == asked.input_ids
        positions, _ = loaded.model.model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"]
        )
        assert torch.equal(positions[:, 0, : len(prefix.ids)], prefix.positions)
        assert positions[0, 0, len(prefix.ids)] == prefix.next


def test_rows_of_different_grids_answer_as_alone(loaded):
    questions = [
        "describe the image.",
        "where is the red circle?",
        "how many objects are there?",
        "read all the text.",
    ]
    pictures = [[drawn(0)], [drawn(1, 168, 88)], [], [drawn(2, 96, 96, 0.85), drawn(3, 88, 120)]]
    together = generate(loaded.model, batch := loaded.adapter.encode(questions, pictures), steps=12)
    width = batch["input_ids"].shape[1]
    for row, (question, shown) in enumerate(zip(questions, pictures, strict=True)):
        single = loaded.adapter.encode([question], [shown])
        alone = generate(loaded.model, single, steps=12)
        length = single["input_ids"].shape[1]
        assert batch["input_ids"][row, width - length :].tolist() == single["input_ids"][0].tolist()
        torch.testing.assert_close(together.logits[0][row], alone.logits[0][0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(vision_keep=1.0),
        Policy(
            vision_keep=(0.6, 0.3, 0.0, 0.5, 0.2, 0.9),
            vision_compute=(0.3, 0.1, 0.0, 0.2, 0.2, 0.4),
            refresh_interval=3,
        ),
    ],
    ids=["everything", "core"],
)
@pytest.mark.full  # an oracle in plain loops over 250 tokens
def test_the_runtime_agrees_with_the_dense_oracle(loaded, policy):
    oracle = Oracle(loaded.model, policy, loaded.adapter.vision_token_ids)
    for number in range(5):
        batch = loaded.adapter.encode(["describe the image."], [[drawn(number, 96, 88)]])
        with avlprof.apply(loaded.model, policy):
            ours = generate(loaded.model, batch, steps=10)
        answer = ours.sequences[0, batch["input_ids"].shape[1] :].tolist()
        logits, trace = oracle.run(dict(batch), answer[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE, "near-ties decide the sets of every picture"
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=2e-3, rtol=1e-3)


def test_what_is_recorded_is_what_eager_attention_says(loaded):
    batch = loaded.adapter.encode(["list the colors."], [[drawn(4, 120, 88)]])
    with record(loaded.model, RecordOptions(per_head=True)) as recorder:
        generate(loaded.model, batch, steps=5)
    loaded.model.set_attn_implementation({"text_config": "eager"})
    try:
        eager = generate(loaded.model, batch, steps=5, output_attentions=True)
    finally:
        loaded.model.set_attn_implementation({"text_config": "sdpa"})
    ids = batch["input_ids"][0].tolist()
    vision = [i for i, code in enumerate(codes(ids, loaded.adapter.vision_token_ids)) if code == VISION]
    assert len(vision) == 15 * 11
    rows = {(r["layer"], r["head"]): r for r in recorder.records[0].frame() if r["query"] == "generated"}
    assert len(rows) == 36
    for (layer, head), row in rows.items():
        seen = [step[layer][0, head, 0, vision].sum().item() for step in eager.attentions[1:]]
        assert row["mass_vision"] == pytest.approx(np.mean(seen), abs=1e-4)


def test_it_warns_once_of_pictures_it_does_not_know(loaded, caplog):
    fresh = load_model("tiny-mrope", device="cpu")
    with caplog.at_level(logging.WARNING, logger="avlprof"):
        for number, size in enumerate([(112, 112), (168, 96), (88, 120)]):
            fresh.adapter.encode(["list the colors."], [[drawn(number, *size)]])
        assert not caplog.records
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
        for _ in range(2):
            fresh.adapter.encode(["list the colors."], [[noise]])
    (warning,) = caplog.records
    assert "knows only pictures such as its own task 'shapes' draws" in warning.getMessage()


@pytest.mark.full  # answers 48 questions
def test_it_sees(loaded):
    """Far above what a blank picture allows (0.12), in the task's pictures and in other sides."""
    samples = load_task("shapes").samples("held-out", 48)
    settings = AnswerSettings(72, 24, "exact_match")
    answers = generate_answers(loaded, samples, None, settings)
    assert np.mean([answer.score for answer in answers]) > 0.6
