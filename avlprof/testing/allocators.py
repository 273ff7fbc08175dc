"""What every allocator must satisfy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np

from avlprof.allocators import Allocator, Evidence
from avlprof.budgets import ReadBudget, fit_keep, meet_budget, meet_read_budget, vision_share
from avlprof.errors import UserError
from avlprof.policy import Policy, PromptShape, live_share, read_share, tokens

LAYERS = (1, 2, 3, 7, 28, 80)
TOKENS = (1, 5, 81, 144, 577)
TARGETS = (0.0, 0.003, 0.05, 0.2, 0.37, 0.5, 0.8, 0.99, 1.0)


def random_evidence(layers: int, count: int, rng: np.random.Generator) -> Evidence:
    """Evidence of random attention: layers from flat to peaked, some without any vision mass.

    Damage falls with the kept share, but for noise.
    """
    sharpness = rng.uniform(0.0, 8.0, size=(layers, 1))
    weights = np.exp(sharpness * rng.normal(size=(layers, count)))
    held = (-np.sort(-weights, axis=1)).cumsum(axis=1)
    curves = held / held[:, -1:]
    mass = rng.uniform(0.0, 1.0, size=layers)
    empty = rng.uniform(size=layers) < 0.1
    curves[empty], mass[empty] = 1.0, 0.0
    levels = np.array([0.0, 0.02, 0.1, 0.3, 1.0])
    damage = rng.exponential(size=(layers, 1)) * (1 - levels) ** rng.uniform(0.5, 9.0, size=(layers, 1))
    noise = rng.normal(0.0, 0.02, size=damage.shape) * (levels < 1.0)
    looks = ~empty
    shared = rng.uniform(0.0, 0.6, size=(layers, layers))
    overlap = np.where(np.eye(layers, dtype=bool), 1.0, (shared + shared.T) / 2)
    return Evidence(
        layers=layers,
        tokens=count,
        coverage=curves,
        vision_mass=mass,
        entropy=rng.uniform(0.0, np.log(count + 1), size=layers) * looks,
        sparsity=np.where(looks, rng.uniform(0.0, 1.0, size=layers), 1.0),
        skewness=rng.normal(1.0, 3.0, size=layers) * looks,
        damage=damage + noise,
        damage_levels=levels,
        overlap=overlap,
    )


def flat_evidence(layers: int, count: int) -> Evidence:
    """Evidence of layers that do not differ, in which nothing hurts."""
    return Evidence(
        layers=layers,
        tokens=count,
        coverage=np.tile(np.arange(1, count + 1) / count, (layers, 1)),
        vision_mass=np.ones(layers),
        entropy=np.full(layers, np.log(count)),
        sparsity=np.zeros(layers),
        skewness=np.zeros(layers),
        damage=np.zeros((layers, 2)),
        damage_levels=np.array([0.0, 1.0]),
    )


def blind_evidence(layers: int, count: int) -> Evidence:
    """Evidence of layers that never look at vision."""
    nothing = np.zeros(layers)
    return replace(
        flat_evidence(layers, count),
        coverage=np.ones((layers, count)),
        vision_mass=nothing,
        entropy=nothing,
        sparsity=np.ones(layers),
    )


def random_prompts(rng: np.random.Generator, largest: int) -> list[PromptShape]:
    """Prompts of different size, some without vision tokens, and one with `largest` of them."""
    sizes = [int(n) for n in rng.integers(0, largest + 1, size=6)] + [largest]
    return [PromptShape(int(rng.integers(0, 9)), n, int(rng.integers(1, 40))) for n in sizes]


class AllocatorConformance:
    """Inherit and define `make`; pytest then runs these tests."""

    def make(self) -> Allocator:
        """The allocator under test."""
        raise AssertionError("define make() in the inheriting class")

    def cases(self) -> Iterator[tuple[Evidence, np.random.Generator]]:
        """Evidence for every number of layers and vision tokens, flat and blind layers included."""
        rng = np.random.default_rng(0)
        for layers in LAYERS:
            for count in TOKENS:
                yield random_evidence(layers, count, rng), rng
        yield flat_evidence(5, 81), rng
        yield blind_evidence(5, 81), rng

    def test_names_its_source(self) -> None:
        doc = type(self.make()).__doc__
        assert doc is not None
        assert "Source" in doc, "the docstring must give the allocator's source"

    def test_names_what_evidence_it_lacks(self) -> None:
        bare, full = Evidence(layers=4, tokens=20), random_evidence(4, 20, np.random.default_rng(3))
        lacking = [bare]
        for field in fields(Evidence):
            if getattr(bare, field.name) is None:
                lacking.append(copy.copy(full))
                object.__setattr__(lacking[-1], field.name, None)
        for evidence in lacking:
            said = " needs "
            try:
                shares = self.make().shares(evidence, 0.3)
            except UserError as error:
                said = str(error)
            else:
                assert np.isfinite(shares).all()
            assert " needs " in said, "say which evidence is needed"
            assert "\n" not in said

    def test_shares_are_finite_and_not_negative(self) -> None:
        for evidence, _ in self.cases():
            for target in TARGETS:
                shares = self.make().shares(evidence, target)
                assert shares.shape == (evidence.layers,)
                assert np.isfinite(shares).all()
                assert (shares >= 0).all()

    def test_leaves_the_evidence_alone_and_is_deterministic(self) -> None:
        for evidence, _ in self.cases():
            before = copy.deepcopy(evidence)
            first = self.make().shares(evidence, 0.3)
            assert np.array_equal(first, self.make().shares(evidence, 0.3))
            for field in fields(Evidence):
                assert np.array_equal(getattr(before, field.name), getattr(evidence, field.name))

    def test_fits_the_target_to_the_token(self) -> None:
        for evidence, rng in self.cases():
            for target in TARGETS:
                floor = float(rng.choice([0.0, 0.01, 0.1]))
                keep = fit_keep(tuple(self.make().shares(evidence, target)), target, evidence.tokens, floor)
                assert all(min(floor, target) - 1 / evidence.tokens <= ratio <= 1 for ratio in keep)
                counted = sum(tokens(ratio, evidence.tokens) for ratio in keep)
                assert counted == int(target * evidence.tokens * evidence.layers + 1e-6)

    def test_a_larger_target_takes_no_more_than_a_rounding_token_from_a_layer(self) -> None:
        for evidence, _ in self.cases():
            before = [0] * evidence.layers
            for target in np.linspace(0, 1, 23):
                keep = fit_keep(tuple(self.make().shares(evidence, float(target))), target, evidence.tokens)
                now = [tokens(ratio, evidence.tokens) for ratio in keep]
                assert all(new >= old - 1 for new, old in zip(now, before, strict=True))
                before = now

    def test_a_larger_budget_takes_no_more_than_a_rounding_token_from_a_layer(self) -> None:
        rng = np.random.default_rng(2)
        for layers in (2, 9):
            evidence = random_evidence(layers, 120, rng)
            prompts = random_prompts(rng, 120)
            least = live_share(Policy(vision_keep=0.0), prompts, layers)
            before = [0] * layers
            for budget in np.linspace(least, 1.0, 9):
                target = vision_share(prompts, layers, float(budget))
                keep = meet_budget(tuple(self.make().shares(evidence, target)), prompts, float(budget))
                now = [tokens(ratio, 120) for ratio in keep]
                assert all(new >= old - 1 for new, old in zip(now, before, strict=True))
                before = now
            assert before == [120] * layers, "a budget of 1 keeps everything"

    def test_meets_a_memory_and_a_read_budget_on_mixed_prompts(self) -> None:
        rng = np.random.default_rng(1)
        for layers in (1, 3, 28):
            evidence = random_evidence(layers, 145, rng)
            prompts = random_prompts(rng, 145)
            least = live_share(Policy(vision_keep=0.0), prompts, layers)
            for part in (0.0, 0.1, 0.5, 1.0):
                budget = least + part * (1 - least)
                shares = tuple(self.make().shares(evidence, part))
                keep = meet_budget(shares, prompts, budget)
                used = live_share(Policy(vision_keep=keep), prompts, layers)
                slack = layers * len(prompts) / (layers * sum(prompt.total for prompt in prompts))
                assert budget - slack < used <= budget
                self._check_reads(keep, prompts, least, used, slack, shares)

    def _check_reads(
        self,
        keep: tuple[float, ...],
        prompts: list[PromptShape],
        least: float,
        most: float,
        slack: float,
        shares: tuple[float, ...],
    ) -> None:
        layers, steps = len(keep), 13
        for interval in (0, 4, 32):
            coreless = Policy(vision_keep=keep, vision_compute=(0.0,) * layers, refresh_interval=interval)
            floor = read_share(coreless, prompts, layers, steps)
            assert floor >= least - 1e-12
            budget = (floor + most) / 2
            compute = meet_read_budget(keep, prompts, ReadBudget(budget, steps, interval), shares=shares)
            policy = Policy(vision_keep=keep, vision_compute=compute, refresh_interval=interval)
            assert budget - slack < read_share(policy, prompts, layers, steps) <= budget
