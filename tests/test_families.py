"""Every family through the generic adapter: small random models, against stock, oracle and eager."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import avlprof
from avlprof.attention.modality import MODALITIES
from avlprof.models import adapter_for
from avlprof.models.aliases import is_tested
from avlprof.policy import DENSE, Policy, ScorerSpec, TextPolicy
from avlprof.runtime.adaptive import AdaptiveLayer
from avlprof.runtime.forced import ForcedBatch
from avlprof.testing.adapters import FamilyConformance
from avlprof.testing.families import families
from avlprof.tracing import RecordOptions, record

from .oracle import Oracle

FAMILIES = dict(families())
POLICIES = {
    "core": Policy(vision_keep=(0.62, 0.3, 0.45), vision_compute=(0.33, 0.1, 0.2), refresh_interval=3),
    "accumulated and window": Policy(
        vision_keep=(0.4, 0.55, 0.3), scorer=ScorerSpec(name="accumulated"), text=TextPolicy(window=5, sink=1)
    ),
}
ANSWER_TYPES = {"paligemma": {"token_type_ids": 1}, "paligemma2": {"token_type_ids": 1}}
NEAR_TIE = 1e-5  # relative score gap under which fp32 may order two tokens either way
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: a second thread costs more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def built(name):
    return FAMILIES[name]()


@pytest.fixture(params=list(FAMILIES))
def case(request):
    return built(request.param)


def generate(case, inputs, steps=STEPS, **options):
    """Greedy tokens, none of them an image token."""
    return case.model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=list(case.vision_token_ids),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def oracle(case, policy):
    types = {"token_type_ids": 0} | ANSWER_TYPES.get(case.name, {})
    return Oracle(case.model, policy, case.vision_token_ids, types)


def test_keep_all_is_the_stock_model(case):
    inputs = case.inputs(2, seed=3, pad=True, text=13)
    assert not inputs["attention_mask"].all()
    stock = generate(case, inputs)
    for policy in (DENSE, Policy(vision_keep=1.0, text=TextPolicy(window=500))):
        with avlprof.apply(case.model, policy):
            ours = generate(case, inputs)
        for a, b in zip(ours.logits, stock.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            top = b.topk(2).values
            if not torch.equal(a.argmax(-1), b.argmax(-1)):
                assert (top[:, 0] - top[:, 1]).min() < 1e-3
                break


@pytest.mark.parametrize("name", list(POLICIES))
def test_agrees_with_the_dense_oracle(case, name):
    policy = POLICIES[name]
    for seed in range(11, 16):
        inputs = case.inputs(1, seed=seed, text=13, images_per_row=2)
        with avlprof.apply(case.model, policy) as runtime:
            ours = generate(case, inputs, steps=14)
        answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits, trace = oracle(case, policy).run(inputs, answer[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE, "near-ties decide the sets of every seed"
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=1e-4, rtol=1e-4)
    for index, layer in enumerate(runtime.cache.layers):
        if isinstance(layer, AdaptiveLayer):
            kept, core = layer.vision_positions(0)
            assert [set(row.tolist()) for row in kept] == trace.kept[index]
            assert [set(row.tolist()) for row in core] == trace.cores[index][-1]


def test_the_policy_matters(case):
    """A guard of the tests above: what they evict would be missed."""
    inputs = case.inputs(1, seed=11, text=13, images_per_row=2)
    stock = generate(case, inputs).logits[1]
    with avlprof.apply(case.model, POLICIES["core"]):
        assert (generate(case, inputs).logits[1] - stock).abs().max() > 0.02
