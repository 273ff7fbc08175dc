"""Every image-text-to-text type of transformers, small and random: right, or refused in a sentence."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
import torch

import avlprof
from avlprof.attention.gate import Role, check_traced, layer_roles
from avlprof.attention.session import cache_of
from avlprof.errors import UserError
from avlprof.models import adapter_for
from avlprof.policy import DENSE, Policy, TextPolicy
from avlprof.testing.types import (
    VARIANTS,
    give_features,
    model_types,
    tiny_inputs,
    tiny_model,
    vision_ids,
)
from avlprof.tracing import record

TEXTS = (
    "gpt_oss",
    "flint",
    "granite_swa",
    "diffllama",
    "doge",
    "jetmoe",
    "deepseek_v3",
    "deepseek_v32",
    "qwen3_next",
)
BEFORE_SINKS = ("llava:granite_swa",)  # eager reports weights without them: see tests/tracing/test_sinks.py
TESTED = (
    "llava",
    "aya_vision",
    "gemma4",
    "gemma4:shared",
    "gemma4:whole",
    "glm5_next",
    "granite4_vision",
    "gemma3n",
    "hy_v4_vl",
    "inkling_mm_model",
    "instructblip",
    "janus",
    "kimi_k25",
    "lfm3_vl",
    "llava:diffllama",
    "llava:gpt_oss",
    "minimax_m3_vl:sparse",
    "mistral4",
    "mllama",
    "nemotron_h_omni",
    "qwen3_5",
    "qwen3_vl_moe",
    "t5gemma2",
    "unlimited_ocr",
)
QUICK = (
    "llava",
    "gemma4",
    "inkling_mm_model",
    "instructblip",
    "llava:diffllama",
    "minimax_m3_vl:sparse",
    "mllama",
)
NO_ATTENTION = ("linear_attention", "conv", "moe", "mlp")
PACKED = Policy(vision_keep=1.0, text=TextPolicy(window=500))
STEPS = 6

BROKEN = ("llama4",)
"""Types whose stock model fails by itself in a version that is supported."""

TWICE, OTHER_KEYS = "calls attention twice", "stores"
OWN_NUMBERS = "adds numbers of its own"
BIAS, PARTLY = "takes 'position_bias'", "attends for 1 of"
NO_LAYER = "no full-attention layer that a policy could act on"
NOT_RUN = {
    "llava:doge": OWN_NUMBERS,
    "llava:diffllama": TWICE,
    "llava:jetmoe": OTHER_KEYS,
}
"""Types that are refused at their first call under a policy, by a piece of the sentence."""

NOT_RECORDED = {
    "llava:doge": OWN_NUMBERS,
    "llava:diffllama": TWICE,
    "gemma4:shared": PARTLY,
    "inkling_mm_model": BIAS,
    "inkling2": BIAS,
    "inkling2_loop": BIAS,
}


def rows():
    """All types and variants; those that are not quick are full or slow."""
    for name in (*model_types(), *VARIANTS, *(f"llava:{text}" for text in TEXTS)):
        left_out = [pytest.mark.full] if name in TESTED else [pytest.mark.slow]
        yield pytest.param(name, marks=[] if name in QUICK else left_out)


@cache
def built(name):
    return tiny_model(name)


def generate(model, inputs, steps=STEPS, **options):
    """Greedy tokens, none of them an image token."""
    torch.manual_seed(0)
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        suppress_tokens=list(vision_ids(model)) or None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def refusal(model):
    """The sentence of the check, None where the model fits."""
    try:
        check_traced(model)
    except UserError as error:
        return str(error)
    return None


def runs(model, inputs):
    """Whether a prompt of ids alone is enough for the type's stock model."""
    try:
        generate(model, inputs, steps=2)
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    return True


def assert_same(ours, stock):
    for a, b in zip(ours.logits, stock.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        if not torch.equal(a.argmax(-1), b.argmax(-1)):
            top = b.topk(2).values
            assert (top[:, 0] - top[:, 1]).min() < 1e-3
            return


@pytest.mark.parametrize("name", rows())
def test_keep_all_is_the_stock_model_or_the_type_is_refused(name):
    model = built(name)
    assert sum(value.numel() for value in model.parameters()) < 1e7
    inputs = tiny_inputs(model, batch=2)
    sentence = refusal(model)
    if sentence is not None:
        assert "\n" not in sentence and f"'{model.config.model_type}'" in sentence
        return
    if name in BROKEN:
        return
    assert runs(model, inputs), "a type that this test cannot run has to be refused"
    stock = generate(model, inputs)
    roles = layer_roles(model.config.get_text_config(decoder=True))
    sentence = NOT_RUN.get(name) if any(role.governed for role in roles) else NO_LAYER
    for policy in (DENSE, PACKED):
        if sentence is None:
            with avlprof.apply(model, policy):
                ours = generate(model, inputs)
            assert_same(ours, stock)
        else:
            with pytest.raises(UserError, match=sentence), avlprof.apply(model, policy):
                generate(model, inputs)
    assert_same(generate(model, inputs), stock)


@pytest.mark.parametrize("name", rows())
def test_what_is_recorded_is_eager_and_the_answer_is_stock(name):
    model = built(name)
    inputs = tiny_inputs(model)
    if not runs(model, inputs):
        assert refusal(model) is not None or name in BROKEN
        return
    stock = generate(model, inputs)
    sentence = refusal(model) or NOT_RECORDED.get(name)
    if sentence is not None:
        with pytest.raises(UserError, match=re.escape(sentence)), record(model):
            generate(model, inputs)
        return
    with record(model) as recorder:
        ours = generate(model, inputs)
    scores = recorder.records[0].scores()
    assert_same(ours, stock)
    if name in BEFORE_SINKS:
        return
    vision = torch.isin(inputs["input_ids"][0], torch.tensor(vision_ids(model)))
    attended, steps = eager(model, inputs)
    for index, weights in zip(attended, steps[0], strict=True):
        mass = whole(weights[0, :, -1], vision).mean(dim=0)
        np.testing.assert_allclose(scores["last"][index], mass, atol=1e-4)
    for step, layers in enumerate(steps[1:]):
        for index, weights in zip(attended, layers, strict=True):
            row = weights[0, :, 0]
            row = torch.nn.functional.pad(row, (len(vision) + step + 1 - row.shape[-1], 0))
            mass = whole(row, vision).mean(dim=0)
            np.testing.assert_allclose(scores["decode"][step][index], mass, atol=1e-4)


def eager(model, inputs):
    """The layers that attend, and their weights in the prompt and each step."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    parts = getattr(model.config, "sub_configs", {})
    name = next((key for key in parts if getattr(model.config, key, None) is text), "")
    model.set_attn_implementation({name: "eager"})
    try:
        steps = generate(model, inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation({name: before})
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None)
    kinds = kinds or ["full_attention"] * len(steps[0])
    attended = [index for index, kind in enumerate(kinds) if kind not in NO_ATTENTION]
    return attended, [[weights for weights in step if weights is not None] for step in steps]


def whole(row, vision):
    return row[:, : len(vision)][:, vision]


@pytest.mark.parametrize("name", ["gemma4", "gemma4:values are keys", "kimi_k25", "llava:minicpm3"])
def test_bytes_of_a_token_are_those_of_the_stock_cache(name):
    """In a layer that policies act on, of several sizes, or else in one of latents."""
    model = built(name)
    with torch.no_grad():
        cache = cache_of(model(**tiny_inputs(model), use_cache=True))
    roles = adapter_for(model, None).roles
    wanted = [role.governed or role.role is Role.LATENT for role in roles]
    held = {
        layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes
        for layer, counts in zip(cache.layers, wanted, strict=True)
        if counts
    }
    assert held == {adapter_for(model, None).kv_bytes_per_token_per_layer()}


@pytest.mark.parametrize("name", rows())
def test_features_of_vision_tokens_matter(name):
    """A guard of the tests above: vision tokens are not all alike, and the answer depends on them."""
    model = built(name)
    inputs = tiny_inputs(model)
    if refusal(model) is not None or not runs(model, inputs):
        return
    first = generate(model, inputs, steps=1).logits[0]
    remove = give_features(model, seed=99)
    try:
        changed = generate(model, inputs, steps=1).logits[0]
    finally:
        remove()
    assert (changed - first).abs().max() > 0.02 * first.std()
