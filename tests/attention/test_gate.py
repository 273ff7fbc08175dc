"""Whoever is switched is right, or refused by what it is: wrappers, threads, contexts, masks, caches."""

from __future__ import annotations

import copy
import threading

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import avlprof
from avlprof.attention.gate import Role, governed_roles, layer_roles
from avlprof.attention.session import cache_of, with_cache
from avlprof.errors import UserError
from avlprof.models import adapter_for
from avlprof.policy import DENSE, Policy, TextPolicy
from avlprof.testing.families import random_gemma3, random_paligemma2
from avlprof.testing.models import random_llava, random_qwen2_5_vl
from avlprof.testing.types import tiny_inputs, tiny_model
from tests.helpers import few, generate_words

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


@pytest.mark.parametrize("before", [True, False])
def test_compiled_models_run_uncompiled_inside(case, inputs, before):
    other = copy.deepcopy(case.model)
    compiled = torch.compile(other, backend="eager") if before else other
    with avlprof.apply(compiled, PACKED), torch.no_grad():
        compiled = compiled if before else torch.compile(other, backend="eager")
        ours = compiled(**inputs, use_cache=True).logits
    torch.testing.assert_close(ours, case.model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", few([random_gemma3, random_llava, random_qwen2_5_vl, random_paligemma2], 1))
def test_static_caches_are_as_dynamic_ones(build):
    """`generate` then hands over a mask of all pairs for each kind of layer, two-way between pictures too."""
    case = build()
    inputs = case.inputs(2, seed=5, pad=True, text=9)
    for policy in (PACKED, POLICY):
        dynamic = under(case, policy, inputs)
        assert torch.equal(under(case, policy, inputs, cache_implementation="static"), dynamic)
    if build is random_paligemma2:  # whose stock model fails with a static cache
        return
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
    hidden, ahead = causal.clone(), causal.clone()
    hidden[..., -1, 2] = False
    ahead[..., 5, 6] = True
    for odd in (hidden, ahead):
        with pytest.raises(UserError, match="neither causal nor"), avlprof.apply(case.model, POLICY):
            case.model(**inputs | {"attention_mask": odd})


@pytest.fixture
def quoting(case):
    """A prompt that says everything twice, so that prompt lookup has tokens to try out."""
    words = torch.arange(5, 12).repeat(3)[None]
    ids = torch.cat([case.inputs(1, seed=5, text=4)["input_ids"], words], dim=1)
    pixels = case.inputs(1, seed=5, text=4)["pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("context", [avlprof.record, lambda model: avlprof.apply(model, POLICY)])
def test_tokens_that_are_tried_out_are_refused_by_their_cause(case, inputs, quoting, context):
    other = random_llava(seed=1)
    with pytest.raises(UserError, match="assisted and prompt-lookup decoding"), context(case.model):
        answer(case, inputs, assistant_model=other.model)
    with pytest.raises(UserError, match="assisted and prompt-lookup decoding"), context(other.model):
        answer(case, inputs, assistant_model=other.model)
    with pytest.raises(UserError, match="assisted and prompt-lookup decoding"), context(case.model):
        answer(case, quoting, prompt_lookup_num_tokens=3)
    with context(case.model), torch.no_grad():  # one's own choice of logits, without a cache to try out on
        case.model(**inputs, logits_to_keep=3)


def test_a_cache_that_was_cut_back_is_refused(case, inputs):
    with avlprof.record(case.model), torch.no_grad():
        cache = cache_of(case.model(**inputs, use_cache=True))
        cache.crop(-2)
        with pytest.raises(UserError, match="cut back from 40 to 38 tokens"):
            case.model(inputs["input_ids"][:, -2:], **with_cache(case.model, cache))


def test_guided_answers_are_recorded_beside_their_second_pass(case, inputs):
    """Classifier-free guidance runs the model over a cache of its own, without the picture."""
    stock = answer(case, inputs, guidance_scale=1.5)
    assert torch.equal(under(case, PACKED, inputs, guidance_scale=1.5), stock)
    with avlprof.record(case.model) as recorder:
        assert torch.equal(answer(case, inputs, guidance_scale=1.5), stock)
    guided, plain = recorder.records
    assert pd.DataFrame(guided.frame()).query("query == 'generated'")["rows"].iloc[0] == 7
    assert pd.DataFrame(plain.frame())["mass_vision"].max() == 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_loop_may_go_on_with_the_cache_that_the_model_made(case, inputs, whole):
    with avlprof.record(case.model) as wanted:
        tokens = answer(case, inputs, steps=3)[:, -3:]
    with avlprof.record(case.model) as recorder, torch.no_grad():
        cache = cache_of(case.model(**inputs, use_cache=True, return_dict=whole))
        for token in tokens[0, :-1]:
            case.model(token[None, None], **with_cache(case.model, cache))
    one, other = (pd.DataFrame(each.records[0].frame()) for each in (recorder, wanted))
    pd.testing.assert_frame_equal(one, other)


class Quantized(QuantizedCache):
    """As transformers', whose backends are packages of their own."""

    def __init__(self, layers):
        super(QuantizedCache, self).__init__(layers=[DynamicLayer() for _ in range(layers)])


def test_caches_that_a_policy_would_replace_are_refused(case, inputs):
    text = case.model.config.get_text_config(decoder=True)
    for kind, cache in (
        ("quantized", Quantized(3)),
        ("offloaded", DynamicCache(config=text, offloading=True)),
    ):
        with pytest.raises(UserError, match=f"{kind} cache does nothing under a policy"):
            under(case, POLICY, inputs, **with_cache(case.model, cache))
    with avlprof.record(case.model) as recorder:
        answer(case, inputs, **with_cache(case.model, Quantized(3)))
    assert len(recorder.records) == 1


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
