"""Joint pools: which tokens of prompt and answer compete, and which are safe."""

from __future__ import annotations

import pytest
import torch

import avlprof
from avlprof.policy import JointPool, Policy, ScorerSpec, sizes
from avlprof.testing.models import cases, random_llava
from tests.helpers import few, generate
from tests.oracle import Oracle

MODELS = dict(cases())
STEPS = 30


def pool(scorer, heads="shared", **options):
    return Policy(pool="joint", joint=JointPool(**options), scorer=ScorerSpec(name=scorer), heads=heads)


@pytest.mark.parametrize("heads", ["shared", "kv_head"])
@pytest.mark.parametrize("scorer", ["position", "last_query", "accumulated"])
def test_an_evicting_pool_keeps_its_size(scorer, heads):
    case = random_llava()
    inputs = case.inputs(batch=2, seed=3, pad=True, text=13)
    policy = pool(scorer, heads, keep=(0.2, 0.35, 0.5), sink=2)
    with avlprof.apply(case.model, policy) as runtime:
        generate(case.model, inputs, steps=STEPS)
    for index, layer in enumerate(runtime.cache.layers):
        held = [sizes(policy, row, 3)[index].stored for row in runtime.cache.rows]
        assert layer.stored_tokens() == held
        for row, count in enumerate(held):
            places = layer.text_positions(row)
            assert places.shape == (2 if heads == "kv_head" else 1, count)
            padding = int((inputs["attention_mask"][row] == 0).sum())
            for one in places.tolist():
                assert len(set(one)) == count
                assert {padding, padding + 1} <= set(one)
                assert min(one) >= padding


@pytest.mark.parametrize(("newest", "options"), [(4, {"recent": 4}), (5, {"recent_share": 0.5})])
def test_the_newest_are_safe(newest, options):
    case = random_llava()
    inputs = case.inputs(seed=5)
    policy = pool("accumulated", keep=0.3, sink=1, **options)
    with avlprof.apply(case.model, policy) as runtime:
        generate(case.model, inputs, steps=STEPS)
    last = inputs["input_ids"].shape[1] + STEPS - 1
    for layer in runtime.cache.layers:
        assert layer.stored_tokens() == [10]
        assert {0, *range(last - newest, last)} <= set(layer.text_positions(0)[0].tolist())


def test_a_growing_pool_keeps_what_is_generated():
    case = random_llava()
    inputs = case.inputs(seed=5)
    policy = pool("value_norm", keep=0.3, sink=2, recent=3, decoding="grow")
    prompt = inputs["input_ids"].shape[1]
    with avlprof.apply(case.model, policy) as runtime:
        generate(case.model, inputs, steps=STEPS)
    for layer in runtime.cache.layers:
        held = set(layer.text_positions(0)[0].tolist())
        assert len(held) == int(0.3 * prompt) + STEPS - 1
        assert {0, 1, *range(prompt - 3, prompt + STEPS - 1)} <= held


@pytest.mark.parametrize("model", few(MODELS, ("llava-4q2kv-sinks",)))
@pytest.mark.parametrize("keep", [0.001, 1.0])
@pytest.mark.parametrize("scorer", few(["position", "last_query", "accumulated"], ["accumulated"]))
def test_pools_of_one_token_and_of_all(model, keep, scorer):
    case = MODELS[model]()
    policy = pool(scorer, keep=keep, sink=1)
    for seed in range(7, 12):
        inputs = case.inputs(seed=seed)
        with avlprof.apply(case.model, policy):
            ours = generate(case.model, inputs, steps=8, suppress_tokens=list(case.vision_token_ids))
        answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits, trace = Oracle(case.model, policy, case.vision_token_ids).run(inputs, answer[:-1])
        if trace.gap > 1e-5:
            break
    assert trace.gap > 1e-5
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=1e-4, rtol=1e-4)
