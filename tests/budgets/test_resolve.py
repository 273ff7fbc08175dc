"""Policies that leave the share of each layer to an allocator."""

from __future__ import annotations

import numpy as np
import pytest

from avlprof.allocators import Evidence
from avlprof.budgets.resolve import resolve, resolve_by_depth
from avlprof.errors import UserError
from avlprof.policy import AllocatorSpec, JointPool, Policy, PromptShape, find_policy, live_share, sizes


@pytest.mark.parametrize("layers", [1, 2, 5, 32])
@pytest.mark.parametrize("mean", [0.0, 0.1, 0.37, 1.0])
def test_the_mean_stays_and_the_line_falls(layers, mean):
    policy = Policy(vision_keep=mean, allocator=AllocatorSpec(name="pyramid"))
    keep = resolve_by_depth(policy, layers).keep(layers)
    assert np.mean(keep) == pytest.approx(mean, abs=1e-4)
    assert list(keep) == sorted(keep, reverse=True)


def test_a_joint_pool_is_spread_as_well():
    policy = resolve_by_depth(find_policy("pyramidkv"), 6)
    assert policy.allocator is None
    assert len(policy.joint.keep) == 6
    assert live_share(policy, [PromptShape(10, 900, 90)], 6) == pytest.approx(0.2, abs=0.002)


def test_the_core_keeps_its_proportion():
    policy = Policy(vision_keep=0.4, vision_compute=0.1, allocator=AllocatorSpec(name="pyramid"))
    found = resolve_by_depth(policy, 5)
    for stored, read in zip(found.keep(5), found.compute(5), strict=True):
        assert read == pytest.approx(stored / 4)


def test_shares_come_from_the_evidence():
    tokens = 50
    concentrated = np.minimum(np.arange(1, tokens + 1) / 5, 1.0)
    even = np.arange(1, tokens + 1) / tokens
    evidence = Evidence(layers=2, tokens=tokens, coverage=np.stack([concentrated, even]))
    keep = resolve(find_policy("prefixkv"), evidence).keep(2)
    assert keep[0] < keep[1]
    assert np.mean(keep) == pytest.approx(0.2, abs=1 / tokens)


def test_unresolved_policies_do_not_run():
    policy = find_policy("prefixkv")
    with pytest.raises(UserError, match="allocator 'coverage'; resolve it"):
        sizes(policy, PromptShape(1, 20, 5), 4)
    with pytest.raises(UserError, match="policy 'prefixkv' cannot be resolved"):
        resolve_by_depth(policy, 4)
    with pytest.raises(ValueError, match="give no list beside it"):
        Policy(vision_keep=(0.1, 0.2), allocator=AllocatorSpec(name="pyramid"))


def test_a_policy_without_an_allocator_is_left_alone():
    policy = Policy(pool="joint", joint=JointPool(keep=0.3), scorer={"name": "position"})
    assert resolve_by_depth(policy, 3) is policy
