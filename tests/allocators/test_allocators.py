from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlprof.allocators import ALLOCATORS, Allocator, Blend, Evidence, Sharp, make_allocator
from avlprof.allocators.coverage import Coverage, covering_shares
from avlprof.allocators.entropy import Entropy
from avlprof.allocators.pyramid import Pyramid
from avlprof.allocators.sensitivity import Sensitivity
from avlprof.allocators.sigmoid import Sigmoid
from avlprof.allocators.sparsity import Sparsity
from avlprof.allocators.strength import Strength
from avlprof.allocators.uniform import Uniform
from avlprof.analysis.scan import STATISTICS, concentration
from avlprof.budgets import ReadBudget, fit_keep, meet_budget, meet_read_budget, vision_share
from avlprof.budgets.fit import hand_out, ratio_of
from avlprof.errors import UserError
from avlprof.policy import Policy, PromptShape, TextPolicy, live_share, read_share, tokens
from avlprof.testing.allocators import AllocatorConformance, random_evidence

# `make quick` runs two of them: one without evidence, one of a profile.


class TestUniform(AllocatorConformance):
    def make(self) -> Allocator:
        return Uniform()


@pytest.mark.full
class TestPyramid(AllocatorConformance):
    def make(self) -> Allocator:
        return Pyramid()


class TestCoverage(AllocatorConformance):
    def make(self) -> Allocator:
        return Coverage()


@pytest.mark.full
class TestSensitivity(AllocatorConformance):
    def make(self) -> Allocator:
        return Sensitivity()


@pytest.mark.full
class TestSigmoid(AllocatorConformance):
    def make(self) -> Allocator:
        return Sigmoid(midpoint=0.3, steepness=25.0)


@pytest.mark.full
class TestSparsity(AllocatorConformance):
    def make(self) -> Allocator:
        return Sparsity()


@pytest.mark.full
class TestEntropy(AllocatorConformance):
    def make(self) -> Allocator:
        return Entropy()


@pytest.mark.full
class TestStrength(AllocatorConformance):
    def make(self) -> Allocator:
        return Strength()


@pytest.mark.full
class TestSharp(AllocatorConformance):
    def make(self) -> Allocator:
        return Sharp(Pyramid(), 2.5)


@pytest.mark.full
class TestBlend(AllocatorConformance):
    def make(self) -> Allocator:
        return Blend(Coverage(), 0.3)


def test_every_built_in_allocator_has_its_conformance_test() -> None:
    tested = {type(case().make()) for case in AllocatorConformance.__subclasses__()}
    assert tested >= {ALLOCATORS.get(name) for name in ALLOCATORS._builtin}


def test_an_unknown_name_or_option_suggests_its_neighbour() -> None:
    with pytest.raises(UserError, match="unknown allocator 'pyramide'; did you mean pyramid"):
        make_allocator("pyramide")
    with pytest.raises(UserError, match=r"'beta_'; did you mean beta"):
        make_allocator("pyramid", beta_=2.0)
    with pytest.raises(UserError, match="takes no options, got 'beta'"):
        make_allocator("uniform", beta=2.0)
    with pytest.raises(UserError, match=r"mix must be in \[0, 1\], got 1.5"):
        make_allocator("uniform", mix=1.5)
    with pytest.raises(UserError, match=r"beta of allocator 'pyramid' must be 1 or more, got 0\.5"):
        make_allocator("pyramid", beta=0.5)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("coverage", "the coverage curves of a profile; analyze a run first"),
        ("sparsity", "the attention sparsity of a profile; analyze a run first"),
        ("entropy", "the attention entropy of a profile; analyze a run first"),
        ("strength", "the attention on vision of a profile and its skewness; analyze a run first"),
        ("sensitivity", "a sensitivity probe, which 'avlprof tune' runs"),
    ],
)
def test_missing_evidence_is_refused(name: str, needs: str) -> None:
    with pytest.raises(UserError, match=f"^allocator '{name}' needs {needs}"):
        make_allocator(name).shares(Evidence(3, 10), 0.5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"midpoint": 1.5}, r"midpoint of allocator 'sigmoid' must be in \[0, 1\], got 1.5"),
        ({"steepness": -1.0}, "steepness of allocator 'sigmoid' must be 0 or more and finite, got -1"),
        ({"steepness": float("inf")}, "must be 0 or more and finite, got inf"),
        ({"midpoint": float("nan")}, r"midpoint of allocator 'sigmoid' must be in \[0, 1\], got nan"),
    ],
)
def test_knobs_out_of_range_are_refused(options: dict[str, float], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        make_allocator("sigmoid", **options)


# fit_keep --------------------------------------------------------------------------------------


def one_by_one(shares: Sequence[float], total: int, count: int, floor: int) -> list[int]:
    """Plain oracle in exact fractions: floors level by level, then each token to who claims it first."""
    kept = [0] * len(shares)
    exact = [Fraction(share) for share in shares]
    if not any(exact):
        exact = [Fraction(1)] * len(shares)
    for _ in range(total):
        below = [layer for layer in range(len(kept)) if kept[layer] < floor]
        claims = [layer for layer in range(len(kept)) if kept[layer] < count and exact[layer] > 0]
        if below:
            taker = min(below, key=lambda layer: (kept[layer], layer))
        elif claims:
            taker = min(claims, key=lambda layer: ((kept[layer] + Fraction(1, 2)) / exact[layer], layer))
        else:
            taker = min(
                (layer for layer in range(len(kept)) if kept[layer] < count),
                key=lambda layer: (kept[layer], layer),
            )
        kept[taker] += 1
    return kept


shares_of_layers = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1.0), st.sampled_from([0.25, 0.5, 1.0])), min_size=1, max_size=9
)


@given(shares_of_layers, st.floats(0, 1), st.integers(1, 60), st.sampled_from([0.0, 0.01, 0.1, 0.5]))
@settings(max_examples=300, deadline=None)
def test_fit_hands_tokens_out_one_by_one(
    shares: list[float], target: float, count: int, floor: float
) -> None:
    keep = fit_keep(shares, target, count, floor)
    total = int(target * count * len(shares) + 1e-6)
    least = next(k for k in range(count + 1) if k >= floor * count - 1e-6)
    found = [tokens(ratio, count) for ratio in keep]
    wanted = one_by_one(shares, total, count, least)
    assert sum(found) == total
    # exact fractions and floats may break a tie apart: a token may lie with another layer
    assert sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 2
    weights = [share / max(shares) if max(shares) else 1.0 for share in shares]
    if len(set(weights)) == len(weights) and 0.0 not in weights and target > floor + 1 / count:
        order = np.argsort(weights)
        assert (np.diff(np.array(found)[order]) >= 0).all(), "who has the larger share keeps no less"


@given(shares_of_layers, st.integers(1, 300), st.data())
@settings(max_examples=200, deadline=None)
def test_a_bigger_budget_never_takes_a_token_from_a_layer(
    shares: list[float], count: int, data: st.DataObject
) -> None:
    floor = data.draw(st.sampled_from([0.0, 0.02, 0.3]))
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    small, large = (fit_keep(shares, target, count, floor) for target in (low, high))
    assert all(a <= b for a, b in zip(small, large, strict=True))


def test_every_total_is_met_and_adds_one_token() -> None:
    rng = np.random.default_rng(0)
    for layers in (1, 2, 6, 31):
        shares = rng.uniform(0, 1, size=layers) * (rng.uniform(size=layers) > 0.2)
        caps = rng.integers(1, 40, size=layers)
        floors = rng.integers(0, 4, size=layers)
        before = np.zeros(layers, dtype=int)
        for total in range(1, caps.sum() + 1):
            now = hand_out(tuple(shares), total, floors, caps)
            assert now.sum() == total
            assert (now <= caps).all()
            assert (now >= before).all()
            before = now


@given(st.integers(1, 20_000), st.data())
@settings(max_examples=300)
def test_a_ratio_means_its_count_and_has_six_decimals(count: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, count))
    ratio = ratio_of(kept, count)
    assert tokens(ratio, count) == kept
    assert ratio == round(ratio, 6)
    assert 0 <= ratio <= 1


def test_the_floor_holds_and_yields_to_a_smaller_target() -> None:
    keep = fit_keep((1.0, 0.0, 0.0, 1.0), 0.5, 144, floor=0.1)
    assert [tokens(k, 144) for k in keep] == [129, 15, 15, 129]
    assert min(keep) >= 0.1
    assert [tokens(k, 144) for k in fit_keep((1.0, 0.0, 0.0, 1.0), 0.05, 144, floor=0.1)] == [7, 7, 7, 7]


@pytest.mark.parametrize("field", ["target", "floor"])
def test_values_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=rf"{field} must be in \[0, 1\], got 1.2"):
        fit_keep((1.0, 1.0), **({"target": 0.5, "tokens": 9} | {field: 1.2}))
    with pytest.raises(UserError, match="finite and not negative"):
        fit_keep((1.0, float("nan")), 0.5, 9)


# the allocators --------------------------------------------------------------------------------


def test_coverage_keeps_the_fewest_tokens_that_cover_one_threshold() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        evidence = random_evidence(6, 101, rng)
        assert evidence.coverage is not None
        for threshold in rng.uniform(0.05, 0.999, size=4):
            shares = covering_shares(evidence.coverage, threshold)
            for row, share in zip(evidence.coverage, shares, strict=True):
                fewest = next(k for k in range(1, 102) if row[k - 1] >= threshold or k == 101)
                assert fewest - 1 <= share * 101 <= fewest + 1e-9
        target = float(rng.uniform(0.02, 0.4))
        shares = Coverage().shares(evidence, target)
        assert shares.mean() == pytest.approx(target, abs=1e-6)
        held = [
            np.interp(s * 101, np.arange(102), [0, *row])
            for s, row in zip(shares, evidence.coverage, strict=True)
        ]
        assert np.ptp(held) < 1e-6, "all layers cover the same share"


def test_pyramid_is_a_falling_line_at_the_mean() -> None:
    for target in (0.05, 0.4, 0.7, 1.0):
        shares = Pyramid(beta=20).shares(Evidence(8, 100), target)
        assert np.allclose(np.diff(shares, n=2), 0)
        assert shares.mean() == pytest.approx(target)
        assert shares[0] <= 1 + 1e-12
    assert Pyramid(beta=20).shares(Evidence(8, 100), 0.2)[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(("budget", "count", "layers"), [(20, 300, 12), (64, 128, 32), (100, 128, 6)])
def test_pyramid_is_the_authors_line(budget: int, count: int, layers: int) -> None:
    """Counts as PyramidKV takes them: the last is a beta-th, the first makes up for it, and is capped."""
    last = budget / 20
    first = 2 * budget - last
    if first > count:
        first, last = count, 2 * budget - count
    wanted = [first - layer * (first - last) / (layers - 1) for layer in range(layers)]
    found = Pyramid().shares(Evidence(layers, count), budget / count) * count
    assert found == pytest.approx(wanted)


def test_coverage_keeps_as_many_as_prefixkv_at_its_threshold() -> None:
    """Every layer sorted, summed up and cut at one share, which is searched for by halving."""
    rng = np.random.default_rng(7)
    for target in (0.1, 0.35, 0.6):
        scores = np.exp(rng.uniform(0.5, 4.0, size=(7, 1)) * rng.normal(size=(7, 200)))
        sums = [np.cumsum(sorted(row / row.sum(), reverse=True)) for row in scores]

        def kept(share: float, sums: list[np.ndarray] = sums) -> list[int]:
            return [int(np.searchsorted(row, share)) + 1 for row in sums]

        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(kept(middle)) <= target * 7 * 200 else (low, middle)
        found = Coverage().shares(Evidence(7, 200, coverage=np.stack(sums)), target) * 200
        assert np.abs(found - kept(low)).max() <= 1.0


def test_sparsity_is_vl_caches_share_where_nothing_is_clipped() -> None:
    rng = np.random.default_rng(8)
    for budget in (0.1, 0.3, 0.5):
        sparsity = rng.uniform(0.2, 0.7, size=9)
        wanted = [(1 - s) / sum(1 - sparsity) * budget * 9 for s in sparsity]
        assert min(wanted) > 0.01
        assert max(wanted) < 1.0
        shares = Sparsity().shares(Evidence(9, 500, sparsity=sparsity), budget)
        found = fit_keep(shares.tolist(), budget, 500, floor=0.01)
        assert np.abs(np.array(found) - wanted).max() <= 1 / 500


def test_entropy_is_medas_softmax_of_text_over_vision_keys() -> None:
    """From logits of text rows: a softmax over vision keys alone is the whole one, divided by its sum."""
    rng = np.random.default_rng(9)
    vision = np.arange(4, 34)
    logits = rng.uniform(0.3, 3.0, size=(5, 1)) * rng.normal(size=(5, 40))
    seen, wanted = [], []
    for row in logits:
        weights = np.exp(row) / np.exp(row).sum()
        seen.append(weights[vision])
        alone = np.exp(row[vision]) / np.exp(row[vision]).sum()
        wanted.append(-sum(p * math.log(p) for p in alone))
    spread = concentration(np.array(seen)[None])
    entropy = spread[:, STATISTICS.index("entropy")]
    assert entropy == pytest.approx(wanted)
    shares = Entropy().shares(Evidence(5, 30, entropy=entropy), 0.3)
    total = sum(math.exp(e) for e in wanted)
    assert shares / shares.sum() == pytest.approx([math.exp(e) / total for e in wanted])


def test_sigmoid_is_the_logistic_function_of_depth() -> None:
    for layers, midpoint, steepness in ((2, 0.5, 10.0), (7, 0.0, 3.0), (28, 0.9, 40.0), (80, 0.4, 600.0)):
        shares = Sigmoid(midpoint, steepness).shares(Evidence(layers, 10), 0.3)
        for layer, share in enumerate(shares):
            power = steepness * (layer / (layers - 1) - midpoint)
            assert share == pytest.approx(1 / (1 + math.exp(power)) if power < 700 else 0.0, abs=1e-12)
        assert (np.diff(shares) <= 0).all()
    assert np.allclose(Sigmoid(0.3, 0.0).shares(Evidence(9, 10), 0.3), 0.5)
    assert Sigmoid().shares(Evidence(1, 10), 0.3)[0] > 0


def test_sparsity_entropy_and_strength_follow_their_formulae() -> None:
    rng = np.random.default_rng(11)
    for _ in range(10):
        found = random_evidence(6, 90, rng)
        assert found.sparsity is not None
        assert found.entropy is not None
        assert found.vision_mass is not None
        assert found.skewness is not None
        dense = [1 - share for share in found.sparsity]
        tokens_seen = [math.exp(entropy) for entropy in found.entropy]
        heads = [max(skew, 0.0) for skew in found.skewness]
        both = [
            0.5 * mass / sum(found.vision_mass) + 0.5 * head / sum(heads)
            for mass, head in zip(found.vision_mass, heads, strict=True)
        ]
        for allocator, wanted in ((Sparsity(), dense), (Entropy(), tokens_seen), (Strength(), both)):
            shares = allocator.shares(found, 0.3)
            assert np.allclose(shares / shares.sum(), np.array(wanted) / sum(wanted))


def test_strength_without_a_skewed_layer_follows_the_mass() -> None:
    evidence = Evidence(3, 9, vision_mass=np.array([0.1, 0.2, 0.3]), skewness=np.array([-1.0, 0.0, -2.0]))
    assert np.allclose(Strength().shares(evidence, 0.3), [0.75, 1.0, 1.25])


def test_blend_is_a_weighted_mean_with_uniform() -> None:
    evidence = random_evidence(5, 64, np.random.default_rng(5))
    inner = Coverage().shares(evidence, 0.3)
    for mix in (0.0, 0.2, 1.0):
        blended = Blend(Coverage(), mix).shares(evidence, 0.3)
        assert np.allclose(0.3 * blended, mix * inner + (1 - mix) * 0.3, atol=1e-6)


# budgets ---------------------------------------------------------------------------------------

prompt_lists = st.lists(
    st.builds(PromptShape, st.integers(0, 20), st.integers(0, 150), st.integers(1, 40)),
    min_size=1,
    max_size=8,
)
texts = st.sampled_from([TextPolicy(), TextPolicy(window=8, sink=4), TextPolicy(keep=0.5, minimum=3)])


@given(prompt_lists, shares_of_layers, st.floats(0, 1), texts, st.sampled_from([0.0, 0.05]))
@settings(max_examples=150, deadline=None)
def test_a_memory_budget_is_met_or_its_floor_named(
    prompts: list[PromptShape], shares: list[float], budget: float, text: TextPolicy, floor: float
) -> None:
    layers = len(shares)
    least = live_share(Policy(vision_keep=0.0, text=text), prompts, layers)
    if least > budget:
        with pytest.raises(UserError, match="what system and text alone need; raise the budget"):
            meet_budget(shares, prompts, budget, text, floor)
        return
    keep = meet_budget(shares, prompts, budget, text, floor)
    used = live_share(Policy(vision_keep=keep, text=text), prompts, layers)
    token = 1 / (layers * sum(prompt.total for prompt in prompts))
    assert used <= budget
    assert used > budget - layers * len(prompts) * token or all(ratio == 1.0 for ratio in keep)
    if len({prompt.vision for prompt in prompts}) == 1 and not all(ratio == 1.0 for ratio in keep):
        assert used > budget - len(prompts) * token, "prompts of one size miss by less than a token each"


@given(prompt_lists, shares_of_layers, st.floats(0, 1), st.floats(0, 1), texts)
@settings(max_examples=80, deadline=None)
def test_a_bigger_memory_budget_never_takes_from_a_layer(
    prompts: list[PromptShape], shares: list[float], a: float, b: float, text: TextPolicy
) -> None:
    least = live_share(Policy(vision_keep=0.0, text=text), prompts, len(shares))
    low, high = (min(least + (1 - least) * part, 1.0) for part in sorted((a, b)))
    small, large = (meet_budget(shares, prompts, budget, text) for budget in (low, high))
    assert all(x <= y for x, y in zip(small, large, strict=True))


@given(
    prompt_lists,
    st.lists(st.floats(0, 1), min_size=1, max_size=7),
    st.floats(0, 1),
    st.integers(0, 9),
    st.integers(1, 40),
    texts,
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_read_budget_is_met_or_its_floor_named(
    prompts: list[PromptShape],
    ratios: list[float],
    budget: float,
    interval: int,
    steps: int,
    text: TextPolicy,
    own_shape: bool,
) -> None:
    keep, layers = tuple(round(ratio, 6) for ratio in ratios), len(ratios)
    shares = tuple(1.0 - ratio / 2 for ratio in ratios) if own_shape else None

    def used(compute: tuple[float, ...]) -> float:
        policy = Policy(vision_keep=keep, vision_compute=compute, refresh_interval=interval, text=text)
        return read_share(policy, prompts, layers, steps)

    reads = ReadBudget(budget, steps, interval)
    if used((0.0,) * layers) > budget:
        with pytest.raises(UserError, match=r"read alone; raise the read budget"):
            meet_read_budget(keep, prompts, reads, text, shares)
        return
    compute = meet_read_budget(keep, prompts, reads, text, shares)
    assert all(core <= kept for core, kept in zip(compute, keep, strict=True))
    assert used(compute) <= budget
    token = 1 / sum(prompt.total for prompt in prompts)
    assert used(compute) > budget - len(prompts) * token or used(compute) == used(keep)


def test_the_error_names_a_budget_that_is_enough() -> None:
    prompts = [PromptShape(10, 144, 5), PromptShape(11, 144, 3)]
    with pytest.raises(UserError) as caught:
        meet_budget((1.0,) * 6, prompts, 0.03)
    assert str(caught.value) == (
        "budget 0.03 is below 0.092, what system and text alone need; raise the budget or set a text window"
    )
    assert meet_budget((1.0,) * 6, prompts, 0.092)
    with pytest.raises(UserError) as caught:
        meet_read_budget((0.4,) * 6, prompts, ReadBudget(0.03, 12, 4))
    named = float(str(caught.value).split("below ")[1].split(",")[0])
    assert meet_read_budget((0.4,) * 6, prompts, ReadBudget(named, 12, 4))


def test_a_text_window_makes_room_for_vision() -> None:
    prompts = [PromptShape(5, 100, 95)]
    assert vision_share(prompts, 4, 0.6) == pytest.approx(0.2)
    assert vision_share(prompts, 4, 0.6, TextPolicy(window=15)) == pytest.approx(1.0)
    assert vision_share([PromptShape(5, 0, 5)], 4, 1.0) == 1.0
    with pytest.raises(UserError, match=r"budget must be in \[0, 1\], got 1.1"):
        vision_share(prompts, 4, 1.1)
    with pytest.raises(UserError, match="at least one prompt"):
        vision_share([], 4, 0.5)
