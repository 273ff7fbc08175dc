"""Every family under every kind of policy: kept sets, text sets and logits as the dense oracle has them.

`test_families` has the plain kinds (eviction, a core, a window).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import avlprof
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.testing.families import families
from avlprof.testing.models import cases
from tests.helpers import FEW, generate_words, thinned
from tests.oracle import NEAR_TIE, Oracle
from tests.policies import SCORING

FAMILIES = dict((*cases(), *families()))
BOTH_WAYS = ("paligemma", "paligemma2")  # their generated tokens have a type of their own
STEPS = 10


@cache
def built(family):
    return FAMILIES[family]()


@pytest.mark.parametrize("kind", thinned(SCORING, ("history", "h2o")))
@pytest.mark.parametrize("family", thinned(FAMILIES, FEW, ("qwen3_vl", "gemma3")))
def test_agrees_with_the_dense_oracle(family, kind):
    case, policy = built(family), SCORING[kind]
    types = {"token_type_ids": int(family in BOTH_WAYS)}
    oracle = Oracle(case.model, policy, case.vision_token_ids, types)
    for seed in range(21, 26):
        inputs = case.inputs(1, seed=seed, text=9, images_per_row=1 + (kind == "history"))
        with avlprof.apply(case.model, policy) as runtime:
            ours = generate_words(case, inputs, STEPS)
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
