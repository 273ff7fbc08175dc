"""Every family under every kind of policy: kept sets, text sets and logits as the dense oracle has them.

`test_families` has the plain kinds (eviction, a core, a window).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import avlprof
from avlprof.policy import JointPool, Policy, ScorerSpec, TextPolicy
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.testing.families import families
from avlprof.testing.models import cases
from tests.oracle import Oracle

FAMILIES = dict((*cases(), *families()))
VISION = {"vision_keep": (0.62, 0.3, 0.45), "vision_compute": (0.33, 0.1, 0.2)}
POLICIES = {
    "history": Policy(
        **VISION, refresh_interval=3, text=TextPolicy(keep=(0.5, 0.35, 0.7), minimum=3, scorer="history")
    ),
    "h2o": Policy(
        pool="joint",
        joint=JointPool(keep=(0.3, 0.5, 0.2), sink=1, recent_share=0.5),
        scorer=ScorerSpec(name="accumulated"),
        heads="kv_head",
    ),
    "snapkv": Policy(
        pool="joint",
        joint=JointPool(keep=0.4, sink=0, recent=4, decoding="grow"),
        scorer=ScorerSpec(name="last_query"),
        heads="kv_head",
    ),
    "tova": Policy(pool="joint", joint=JointPool(keep=0.4, sink=0), scorer=ScorerSpec(name="last_query")),
    "score only": Policy(**VISION, refresh_interval=3, refresh="score_only", heads="kv_head"),
    "heavy": Policy(
        vision_keep=(0.5, 0.3, 0.45),
        text=TextPolicy(window=3, sink=(0, 1, 2), heavy=(4, 2, 1), scorer="accumulated"),
    ),
}
BOTH_WAYS = ("paligemma", "paligemma2")  # their generated tokens have a type of their own
NEAR_TIE = 1e-5  # relative score gap under which fp32 may order two tokens either way
STEPS = 10


@cache
def built(family):
    return FAMILIES[family]()


@pytest.mark.parametrize("kind", list(POLICIES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_agrees_with_the_dense_oracle(family, kind):
    case, policy = built(family), POLICIES[kind]
    types = {"token_type_ids": int(family in BOTH_WAYS)}
    oracle = Oracle(case.model, policy, case.vision_token_ids, types)
    for seed in range(21, 26):
        inputs = case.inputs(1, seed=seed, text=9, images_per_row=1 + (kind == "history"))
        with avlprof.apply(case.model, policy) as runtime:
            ours = case.model.generate(
                **inputs,
                max_new_tokens=STEPS,
                do_sample=False,
                suppress_tokens=list(case.vision_token_ids),
                output_logits=True,
                return_dict_in_generate=True,
            )
        answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits, trace = oracle.run(inputs, answer[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE, "near-ties decide the sets of every seed"
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=1e-4, rtol=1e-4)
    governed = [i for i, layer in enumerate(runtime.cache.layers) if isinstance(layer, AdaptiveLayer)]
    assert governed
    for index in governed:
        layer = runtime.cache.layers[index]
        kept, core = layer.vision_positions(0)
        if policy.joint is None:
            assert [set(row.tolist()) for row in kept] == trace.kept[index]
            assert [set(row.tolist()) for row in core] == trace.cores[index][-1]
        assert [set(row.tolist()) for row in layer.text_positions(0)] == trace.text[index][-1]
