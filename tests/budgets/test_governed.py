"""Models that policies govern in part: budgets are met as on a model of the governed layers alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from avlprof.allocators import ALLOCATORS, Evidence, make_allocator
from avlprof.budgets import ReadBudget, meet_budget, meet_read_budget, scale_to, vision_share
from avlprof.budgets.resolve import resolve, resolve_by_depth
from avlprof.errors import UserError
from avlprof.evaluation import equal_bytes
from avlprof.policy import (
    AllocatorSpec,
    JointPool,
    Policy,
    PrefillFilter,
    PromptShape,
    ScorerSpec,
    TextPolicy,
    live_share,
    load_policy,
    read_share,
    shipped,
    sizes,
)
from avlprof.testing.allocators import random_evidence, random_prompts
from avlprof.tuning.evidence import dump_evidence, parse_evidence

LAYERS, OWN = 7, (1, 2, 5)


def rows_of(seed):
    """The same prompts in the hybrid, and in a model of its governed layers."""
    alone = random_prompts(np.random.default_rng(seed), 80)
    return [replace(prompt, governed=OWN) for prompt in alone], alone


def own(values):
    return tuple(values[layer] for layer in OWN)


def elsewhere(values):
    return {values[layer] for layer in range(LAYERS) if layer not in OWN}


def test_other_layers_count_nothing():
    policy = Policy(vision_keep=0.5, vision_compute=0.25, text=TextPolicy(window=3, sink=1))
    hybrid, plain = PromptShape(3, 40, 9, OWN), PromptShape(3, 40, 9)
    table = sizes(policy, hybrid, LAYERS)
    assert own(table) == tuple(sizes(policy, plain, len(OWN)))
    assert {(size.stored, size.read) for size in elsewhere(table)} == {(0, 0)}
    joint = Policy(pool="joint", joint=JointPool(keep=0.3), scorer=ScorerSpec(name="last_query"))
    assert own(sizes(joint, hybrid, LAYERS)) == tuple(sizes(joint, plain, len(OWN)))


@pytest.mark.parametrize("seed", range(4))
def test_budgets_are_met_as_by_the_governed_layers_alone(seed):
    rng = np.random.default_rng(100 + seed)
    hybrid, alone = rows_of(seed)
    shares = rng.uniform(size=LAYERS)
    text = TextPolicy() if seed % 2 else TextPolicy(window=6, sink=2)
    least = live_share(Policy(vision_keep=0.0, text=text), alone, len(OWN))
    for budget in (least + 0.05, (1 + least) / 2, 1.0):
        assert vision_share(hybrid, LAYERS, budget, text) == vision_share(alone, len(OWN), budget, text)
        keep = meet_budget(shares, hybrid, budget, text, 0.02)
        assert own(keep) == meet_budget(own(shares), alone, budget, text, 0.02)
        assert elsewhere(keep) == {1.0}
        policy = Policy(vision_keep=keep, text=text)
        assert live_share(policy, hybrid, LAYERS) <= budget + 1e-12
        reads = ReadBudget(least + 0.8 * (budget - least), 9, 4)
        compute = meet_read_budget(keep, hybrid, reads, text, shares)
        assert own(compute) == meet_read_budget(own(keep), alone, reads, text, own(shares))
        assert elsewhere(compute) == {1.0}
        cored = Policy(vision_keep=keep, vision_compute=compute, refresh_interval=4, text=text)
        assert read_share(cored, hybrid, LAYERS, 9) <= reads.share + 1e-12


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_allocators_see_the_governed_layers_alone(name):
    whole = replace(random_evidence(LAYERS, 30, np.random.default_rng(4)), governed=OWN)
    arrays = ("coverage", "vision_mass", "entropy", "sparsity", "skewness", "damage")
    cut = {array: getattr(whole, array)[list(OWN)] for array in arrays}
    small = Evidence(len(OWN), 30, damage_levels=whole.damage_levels, **cut)
    allocator = make_allocator(name, mix=0.7, temperature=1.5)
    shares = allocator.shares(whole, 0.3)
    np.testing.assert_array_equal(own(shares), allocator.shares(small, 0.3))
    assert elsewhere(shares) == {0.0}
    spread = Policy(vision_keep=0.3, vision_compute=0.1, allocator=AllocatorSpec(name=name))
    ours, theirs = resolve(spread, whole), resolve(spread, small)
    assert own(ours.keep(LAYERS)) == theirs.keep(len(OWN))
    assert own(ours.compute(LAYERS)) == theirs.compute(len(OWN))
    assert elsewhere(ours.keep(LAYERS)) == elsewhere(ours.compute(LAYERS)) == {1.0}


def test_depth_counts_governed_layers():
    spread = Policy(vision_keep=0.3, allocator=AllocatorSpec(name="pyramid"))
    keep = resolve_by_depth(spread, LAYERS, OWN).keep(LAYERS)
    assert own(keep) == resolve_by_depth(spread, len(OWN)).keep(len(OWN))


SCALED = {
    "flat": Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=3),
    "layered": Policy(vision_keep=(0.9, 0.5, 0.1, 0.2, 0.3, 0.8, 0.7)),
    "joint": Policy(pool="joint", joint=JointPool(keep=0.4), scorer=ScorerSpec(name="last_query")),
    "spread": Policy(vision_keep=0.5, allocator=AllocatorSpec(name="pyramid")),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaling_and_baselines_at_equal_bytes(name):
    hybrid, alone = rows_of(3)
    policy, scaled = SCALED[name], scale_to(SCALED[name], 0.6, hybrid, LAYERS)
    token = len(hybrid) * len(OWN) / sum(prompt.total * len(OWN) for prompt in hybrid)
    assert 0.6 - token <= live_share(scaled, hybrid, LAYERS) <= 0.6
    if policy.layers is None:
        small = scale_to(policy, 0.6, alone, len(OWN))
        assert own(sizes(scaled, hybrid[-1], LAYERS)) == tuple(sizes(small, alone[-1], len(OWN)))
    for baseline in equal_bytes(scaled, hybrid, LAYERS, 8):
        gap = live_share(scaled, hybrid, LAYERS) - live_share(baseline, hybrid, LAYERS)
        assert -1e-12 <= gap <= token
        assert len(set(own(baseline.keep(LAYERS)))) <= 2


def test_a_filter_lets_through_what_governed_layers_hold():
    policy = Policy(vision_keep=0.5, prefill_filter=(PrefillFilter(after_layer=3, keep=0.5),))
    hybrid, _ = rows_of(5)
    scaled = scale_to(policy, 0.5, hybrid, LAYERS)
    assert scaled.prefill_filter[0].keep == scaled.keep(LAYERS)[5] < 0.5


def test_a_uniform_policy_is_flat_where_it_acts():
    hybrid, _ = rows_of(1)
    keep = [1.0] * LAYERS
    for layer in OWN:
        keep[layer] = 0.3
    policy = Policy(vision_keep=tuple(keep))
    assert [baseline.name for baseline in equal_bytes(policy, hybrid, LAYERS, 8)] == ["random"]


def test_models_without_a_governed_layer_are_refused_in_words():
    prompt = PromptShape(3, 40, 9, ())
    with pytest.raises(UserError, match="policies act on no layer"):
        meet_budget((1.0,) * 3, [prompt], 0.5)


def test_evidence_keeps_its_layers():
    evidence = replace(random_evidence(LAYERS, 12, np.random.default_rng(0)), governed=OWN)
    back = parse_evidence(dump_evidence(evidence), "study")
    assert back.governed == OWN
    np.testing.assert_array_equal(back.coverage, evidence.coverage)
    old = dump_evidence(replace(evidence, governed=None)).replace(', "governed": null', "")
    assert parse_evidence(old, "study").governed is None


def test_shipped_policies_scale():
    """A joint pool, text by score and allocators among them."""
    hybrid = [PromptShape(4, 576, 40, OWN)]
    for path in shipped().values():
        policy = load_policy(path)
        try:
            scaled = scale_to(policy, 0.4, hybrid, LAYERS)
        except UserError:
            continue
        assert live_share(scaled, hybrid, LAYERS) <= 0.4
