"""Every image-text-to-text type of transformers, small and random: right, or refused in a sentence.

What is known to be wrong is marked as an expected failure with its cause; mending it fails the mark.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import avlprof
from avlprof.attention.gate import check_traced
from avlprof.errors import UserError
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

TEXTS = ("gpt_oss", "flint", "diffllama", "doge", "jetmoe", "deepseek_v3", "deepseek_v32", "qwen3_next")
QUICK = (
    "llava",
    "aya_vision",
    "gemma4",
    "gemma4:shared",
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
NO_ATTENTION = ("linear_attention", "conv", "moe", "mlp")
PACKED = Policy(vision_keep=1.0, text=TextPolicy(window=500))
STEPS = 6

LATENTS = "the cache holds latents, which the packed step takes for keys"
BY_PARTS = "the check lets it pass, and its own generate runs the language model alone"
ASKS_FOR_NAMES = "it asks for the attention's name and leaves out its choice of keys under ours"
NO_STEPS = "steps are counted by layers that never attend"
FLOAT_MASK = "it hands over a float mask"
WRONG_KEEP_ALL = {
    "blip-2": BY_PARTS,
    "instructblip": BY_PARTS,
    "instructblipvideo": BY_PARTS,
    "diffusion_gemma": "the check lets it pass, and its own generate denoises blocks",
    "kimi_k25": LATENTS,
    "llava:deepseek_v3": LATENTS,
    "llava:diffllama": "two attention calls a layer",
    "llava:doge": FLOAT_MASK,
    "llava:flint": "sinks are dropped",
    "llava:gpt_oss": "sinks are dropped",
    "llava:jetmoe": "the packed step counts heads by the config's KV heads",
}
WRONG_RECORD = {
    "dots3_note": ASKS_FOR_NAMES,
    "hy_v4_vl": ASKS_FOR_NAMES,
    "mistral_large4": ASKS_FOR_NAMES,
    "minimax_m3_vl:sparse": ASKS_FOR_NAMES,
    "llava:deepseek_v32": ASKS_FOR_NAMES,
    "glm5_next": FLOAT_MASK,
    "llava:doge": FLOAT_MASK,
    "inkling2": "attention over depth comes from a module that has no number",
    "inkling2_loop": "attention over depth comes from a module that has no number",
    "inkling_mm_model": "position_bias is left out",
    "llava:gpt_oss": "sinks are left out",
    "llava:flint": "sinks are left out",
    "llava:diffllama": "two attention calls a layer",
    **dict.fromkeys(
        (
            "lfm2_vl",
            "lfm3_vl",
            "minicpm_ocr",
            "minicpmv4_6",
            "minicpmv4_7",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
            "llava:qwen3_next",
        ),
        NO_STEPS,
    ),
}


def rows(wrong):
    """All types and variants; those that are not quick are slow, known faults expected failures."""
    for name in (*model_types(), *VARIANTS, *(f"llava:{text}" for text in TEXTS)):
        marks = [] if name in QUICK else [pytest.mark.slow]
        if name in wrong:
            marks.append(pytest.mark.xfail(reason=wrong[name], strict=True))
        yield pytest.param(name, marks=marks)


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


@pytest.mark.parametrize("name", rows(WRONG_KEEP_ALL))
def test_keep_all_is_the_stock_model_or_the_type_is_refused(name):
    model = built(name)
    assert sum(value.numel() for value in model.parameters()) < 1e7
    inputs = tiny_inputs(model, batch=2)
    sentence = refusal(model)
    if sentence is not None:
        assert "\n" not in sentence and f"'{model.config.model_type}'" in sentence
        return
    assert runs(model, inputs), "a type that this test cannot run has to be refused"
    stock = generate(model, inputs)
    for policy in (DENSE, PACKED):
        with avlprof.apply(model, policy):
            ours = generate(model, inputs)
        assert_same(ours, stock)
    assert_same(generate(model, inputs), stock)


@pytest.mark.parametrize("name", rows(WRONG_RECORD))
def test_what_is_recorded_is_eager_and_the_answer_is_stock(name):
    model = built(name)
    inputs = tiny_inputs(model)
    if not runs(model, inputs):
        assert refusal(model) is not None or name in WRONG_KEEP_ALL
        return
    stock = generate(model, inputs)
    try:
        with record(model) as recorder:
            ours = generate(model, inputs)
        scores = recorder.records[0].scores()
    except UserError:
        ours = None
    if ours is None:
        assert refusal(model) is not None, "refused by the recorder, and not by the check"
        return
    assert_same(ours, stock)
    vision = torch.isin(inputs["input_ids"][0], torch.tensor(vision_ids(model)))
    attended, steps = eager(model, inputs)
    for place, weights in zip(attended, steps[0], strict=True):
        mass = whole(weights[0, :, -1], vision).mean(dim=0)
        np.testing.assert_allclose(scores["last"][place], mass, atol=1e-4)
    for step, layers in enumerate(steps[1:]):
        for place, weights in zip(attended, layers, strict=True):
            row = weights[0, :, 0]
            row = torch.nn.functional.pad(row, (len(vision) + step + 1 - row.shape[-1], 0))
            mass = whole(row, vision).mean(dim=0)
            np.testing.assert_allclose(scores["decode"][step][place], mass, atol=1e-4)


def eager(model, inputs):
    """The layers that attend, and their weights in the prompt and each step."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    parts = getattr(model.config, "sub_configs", {})
    name = next((key for key in parts if getattr(model.config, key, None) is text), "")
    model.set_attn_implementation({name: "eager"})
    try:
        found = generate(model, inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation({name: before})
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None)
    kinds = kinds or ["full_attention"] * len(found[0])
    attended = [place for place, kind in enumerate(kinds) if kind not in NO_ATTENTION]
    return attended, [[weights for weights in step if weights is not None] for step in found]


def whole(row, vision):
    return row[:, : len(vision)][:, vision]


@pytest.mark.parametrize("name", rows({}))
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
