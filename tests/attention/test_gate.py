"""Whoever is switched is right, or refused by what it is: wrappers, threads, contexts, masks, caches."""

from __future__ import annotations

import copy
import threading

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import avlprof
from avlprof.attention.gate import Role, governed_roles, layer_roles
from avlprof.errors import UserError
from avlprof.models import adapter_for
from avlprof.policy import DENSE, Policy, TextPolicy
from avlprof.testing.models import random_llava, random_qwen2_5_vl
from avlprof.testing.types import tiny_inputs, tiny_model
from tests.helpers import generate_words

POLICY = Policy(vision_keep=0.5, vision_compute=0.25, refresh_interval=3)
PACKED = Policy(text=TextPolicy(window=500))  # keeps everything, by the packed step


@pytest.fixture(scope="module")
def case():
    return random_llava()


@pytest.fixture
def inputs(case):
    return case.inputs(1, seed=5, text=14)


def answer(case, inputs, steps=8, **options):
    return generate_words(case, inputs, steps, **options).sequences


def under(case, policy, inputs, **options):
    with avlprof.apply(case.model, policy):
        return answer(case, inputs, **options)


def test_nothing_is_left_behind(case, inputs):
    registered = dict(AttentionInterface._global_mapping)
    stock = answer(case, inputs)
    with pytest.raises(ValueError, match="max_new_tokens"), avlprof.apply(case.model, POLICY):
        answer(case, inputs, steps=0)
    assert AttentionInterface._global_mapping == registered
    assert torch.equal(answer(case, inputs), stock)


def test_attention_that_is_called_in_a_way_that_is_not_known_is_refused(case, inputs, monkeypatch):
    module = type(case.model.get_decoder().layers[0].self_attn)
    forward = module.forward
    monkeypatch.setattr(
        module, "forward", lambda self, *a, **kw: forward(self, *a, **kw, alibi=torch.ones(1))
    )
    with pytest.raises(UserError, match="takes 'alibi'"), avlprof.record(case.model):
        answer(case, inputs)
    with pytest.raises(UserError, match="takes 'alibi'"):
        under(case, POLICY, inputs)


def test_threads_on_one_model_answer_as_alone(case):
    questions = [case.inputs(1, seed=seed, text=8 + seed) for seed in range(4)]
    with avlprof.apply(case.model, POLICY):
        alone = [answer(case, one) for one in questions]
    with avlprof.record(case.model) as recorder:
        for one in questions:
            answer(case, one)
    wanted = [pd.DataFrame(record.frame()) for record in recorder.records]
    answers = {}

    def work(index):
        answers[index] = answer(case, questions[index])

    for context in (avlprof.apply(case.model, POLICY), avlprof.record(case.model)):
        with context as together:
            threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if hasattr(together, "records"):
            frames = {len(record.modality): pd.DataFrame(record.frame()) for record in together.records}
            for record, frame in zip(recorder.records, wanted, strict=True):
                pd.testing.assert_frame_equal(frames[len(record.modality)], frame)
        else:
            assert all(torch.equal(answers[index], alone[index]) for index in range(4))


def test_a_copy_made_inside_is_a_stock_model(case, inputs):
    stock = answer(case, inputs)
    with avlprof.apply(case.model, POLICY):
        other = copy.deepcopy(case.model)
    tokens = other.generate(**inputs, max_new_tokens=8, suppress_tokens=list(case.vision_token_ids))
    assert torch.equal(tokens, stock)


def test_contexts_may_be_left_in_any_order(case, inputs):
    stock, policy = answer(case, inputs), under(case, POLICY, inputs)
    recorder, runtime = avlprof.record(case.model), avlprof.apply(case.model, POLICY)
    recorder.__enter__()
    runtime.__enter__()
    recorder.__exit__(None, None, None)
    assert torch.equal(answer(case, inputs), policy)
    runtime.__exit__(None, None, None)
    assert torch.equal(answer(case, inputs), stock)


def test_attention_that_is_set_inside_a_context_is_refused(case, inputs):
    with avlprof.apply(case.model, POLICY):
        case.model.set_attn_implementation({"text_config": "eager"})
        try:
            with pytest.raises(UserError, match="was set to 'eager' inside the context"):
                answer(case, inputs)
        finally:
            case.model.set_attn_implementation({"text_config": "sdpa"})


def test_a_policys_cache_is_refused_behind_its_context(case, inputs):
    with avlprof.apply(case.model, POLICY):
        first = generate_words(case, inputs, 4)
    ids = first.sequences
    cache = first.get("cache", first.get("past_key_values"))
    with pytest.raises(UserError, match="whose context has been left"):
        case.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


class Wrapper(nn.Module):
    """As PEFT wraps a model: the base model inside is what `generate` runs."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def get_base_model(self):
        return self.inside

    def generate(self, **options):
        return self.inside.generate(**options)


def test_wrapped_models_are_unwrapped(case, inputs):
    wrapped, words = Wrapper(case.model), {"suppress_tokens": list(case.vision_token_ids)}
    policy = under(case, POLICY, inputs)
    with avlprof.apply(wrapped, POLICY), avlprof.record(wrapped) as recorder:
        assert torch.equal(wrapped.generate(**inputs, max_new_tokens=8, **words), policy)
    assert len(recorder.records) == 1
    with (
        pytest.raises(UserError, match="is not a model of transformers"),
        avlprof.apply(nn.Linear(2, 2), POLICY),
    ):
        pass


def test_compiled_models_run_uncompiled_inside(case, inputs):
    other = copy.deepcopy(case.model)
    compiled = torch.compile(other, backend="eager")
    with avlprof.apply(compiled, PACKED), torch.no_grad():
        ours = compiled(**inputs, use_cache=True).logits
    torch.testing.assert_close(ours, case.model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [random_llava, random_qwen2_5_vl])
def test_static_caches_are_as_dynamic_ones(build):
    case = build()
    inputs = case.inputs(2, seed=5, pad=True, text=12)
    for policy in (PACKED, POLICY):
        dynamic = under(case, policy, inputs)
        assert torch.equal(under(case, policy, inputs, cache_implementation="static"), dynamic)
    with avlprof.record(case.model) as plain:
        stock = answer(case, inputs)
    with avlprof.record(case.model) as static:
        assert torch.equal(answer(case, inputs, cache_implementation="static"), stock)
    for one, other in zip(plain.records, static.records, strict=True):
        a, b = pd.DataFrame(one.frame()), pd.DataFrame(other.frame())
        pd.testing.assert_frame_equal(a, b, atol=1e-5)


def test_masks_of_all_pairs(case, inputs):
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    for policy in (DENSE, PACKED, POLICY):
        with avlprof.apply(case.model, policy), torch.no_grad():
            usual = case.model(**inputs).logits
            given = case.model(**inputs | {"attention_mask": causal}).logits
        torch.testing.assert_close(given, usual)
    odd = causal.clone()
    odd[..., -1, 2] = False
    with pytest.raises(UserError, match="not causal"), avlprof.apply(case.model, POLICY):
        case.model(**inputs | {"attention_mask": odd})


def test_what_cannot_be_recorded_is_said(case, inputs):
    with pytest.raises(UserError, match="without a KV cache"), avlprof.record(case.model):
        answer(case, inputs, use_cache=False)
    for context in (avlprof.record(case.model), avlprof.apply(case.model, POLICY)):
        with pytest.raises(UserError, match="leave output_attentions out"), context:
            case.model(**inputs, output_attentions=True)


def flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """The signature of flash attention: a mask of padding alone, causal by itself."""
    assert attention_mask is None or attention_mask.ndim == 2
    mask = None
    if attention_mask is not None:
        rows = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        mask = (torch.arange(key.shape[2]) <= rows) & attention_mask[:, None, None, : key.shape[2]].bool()
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)


def test_kernels_that_take_no_mask_run_prompts_and_ours_runs_evicted_steps(case):
    AttentionInterface.register("stand_in_flash", flash)
    AttentionMaskInterface.register("stand_in_flash", flash_attention_mask)
    inputs = case.inputs(2, seed=5, pad=True, text=12)
    with avlprof.record(case.model) as plain:
        answer(case, inputs)
    wanted = {name: under(case, policy, inputs) for name, policy in (("a", POLICY), ("b", PACKED))}
    other = copy.deepcopy(case)
    try:
        other.model.set_attn_implementation({"text_config": "stand_in_flash"})
        with avlprof.record(other.model) as recorder:
            answer(other, inputs)
        for one, two in zip(plain.records, recorder.records, strict=True):
            pd.testing.assert_frame_equal(pd.DataFrame(one.frame()), pd.DataFrame(two.frame()), atol=1e-5)
        for name, policy in (("a", POLICY), ("b", PACKED)):
            assert torch.equal(under(other, policy, inputs), wanted[name])
    finally:
        AttentionInterface._global_mapping.pop("stand_in_flash")
        AttentionMaskInterface._global_mapping.pop("stand_in_flash")


def test_hybrids_run_on_their_full_layers():
    model = tiny_model("qwen3_5")
    text = model.config.get_text_config(decoder=True)
    roles = layer_roles(text)
    assert {role.role for role in roles} == {Role.STATE, Role.FULL}
    assert governed_roles(text) == roles
    inputs = tiny_inputs(model)
    stock = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with avlprof.apply(model, Policy(vision_keep=0.2)) as runtime:
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
    used = runtime.cache.use()
    assert [use.layer for use in used] == [i for i, role in enumerate(roles) if role.governed]
    assert all(use.prompt < use.dense_prompt for use in used)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), stock)


def test_budgets_of_models_that_are_governed_in_part_say_so():
    plain, hybrid = (adapter_for(model, None) for model in (random_llava().model, tiny_model("qwen3_5")))
    assert (plain.governed, plain.partly_governed) == (None, "")
    assert hybrid.governed == (2,)
    assert hybrid.partly_governed.startswith("budgets and shares are of the KV of 1 of 3 layers (2)")
