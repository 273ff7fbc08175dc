"""Prompts beyond the positions that a model was made for."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from avlprof.errors import UserError
from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.models.context import check_context, context_length
from avlprof.models.generation import greedy
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_task
from avlprof.tracing import trace_samples
from avlprof.tracing.options import TraceSettings


def config(**text):
    inner = SimpleNamespace(**text)
    return SimpleNamespace(get_text_config=lambda decoder: inner, image_token_id=9)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default"}}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 8192),
        (
            {"max_position_embeddings": 131072, "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
            131072,
        ),
        (
            {"max_position_embeddings": 32768, "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            {"max_position_embeddings": 131072, "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            {"max_position_embeddings": 1024, "rope_parameters": {
                "sliding_attention": {"rope_type": "default"},
                "full_attention": {"rope_type": "linear", "factor": 8.0}}},
            8192,
        ),
    ],
)  # fmt: skip
def test_length_of_a_context(text, length):
    assert context_length(config(**text)) == length


def test_padding_does_not_count_and_mrope_shares_positions():
    ids = torch.full((2, 30), 5)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    model = SimpleNamespace(config=config(max_position_embeddings=20))
    with pytest.raises(UserError, match="sample 'b' has 30 tokens, the model has 20 positions"):
        check_context(model, {"input_ids": ids, "attention_mask": mask}, ["a", "b"], 4)
    check_context(model, {"input_ids": ids[:1], "attention_mask": mask[:1]}, ["a"], 4)
    ids[1, :15] = 9
    shared = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    turning = SimpleNamespace(config=config(max_position_embeddings=20, rope_parameters=shared))
    check_context(turning, {"input_ids": ids, "attention_mask": mask}, ["a", "b"], 4)


@pytest.fixture(scope="module")
def long():
    """A sample with eight pictures: 1,568 vision tokens, where the embedded model has 1,024 positions."""
    sample = load_task("shapes:describe").samples("search", 1)[0]
    return replace(sample, images=sample.images * 8)


@pytest.mark.parametrize("verb", ["trace", "evaluate", "forced", "references"])
def test_every_verb_refuses_a_prompt_that_is_too_long(tiny, long, verb, tmp_path):
    task = load_task("shapes:describe")
    verbs = {
        "trace": lambda: trace_samples(tiny, task, [long], tmp_path, TraceSettings(max_new_tokens=2)),
        "evaluate": lambda: generate_answers(tiny, [long], None, AnswerSettings(2, 1)),
        "forced": lambda: ForcedSet.prepare(tiny, [long], max_new_tokens=2),
        "references": lambda: ForcedSet.prepare(tiny, [long], max_new_tokens=2, answers="reference"),
    }
    with pytest.raises(UserError, match=r"has 1,585 tokens, the model has 1,024 positions") as error:
        verbs[verb]()
    assert f"sample '{long.id}'" in str(error.value)


def test_new_tokens_that_run_beyond_are_told_once(tiny_copy, caplog):
    batch = tiny_copy.adapter.encode_samples(load_task("shapes:describe").samples("search", 1))
    tiny_copy.model.config.get_text_config(decoder=True).max_position_embeddings = (
        batch["input_ids"].shape[1] + 1
    )
    with caplog.at_level(logging.WARNING):
        greedy(tiny_copy.model, batch, max_new_tokens=2)
        assert not caplog.records
        for _ in range(2):
            greedy(tiny_copy.model, batch, ["x"], max_new_tokens=3)
    (said,) = [r.getMessage() for r in caplog.records if "positions" in r.getMessage()]
    assert "sample 'x'" in said and "with 3 new ones" in said
