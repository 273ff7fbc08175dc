"""Bits of single layers: the probe in bits, the split of bytes by it, and refinement that starts there."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import optuna
import pytest

from avlprof.allocators import Evidence
from avlprof.allocators.sensitivity import split_bytes
from avlprof.errors import UserError
from avlprof.policy import BITS, Policy, PromptShape, ScorerSpec, live_share, packed_share, sizes
from avlprof.runtime.forced import ForcedScore
from avlprof.tuning import Budget, Settings
from avlprof.tuning import settings as tuning_settings
from avlprof.tuning.evidence import FEWER, LEVELS, dump_evidence, parse_evidence, probed
from avlprof.tuning.objective import Objective
from avlprof.tuning.refine import SAME, SPLIT, LayerSpace, refine, split_by_probe
from avlprof.tuning.settings import make_sampler
from tests.search_space import ByParts, scored_alone
from tests.watching import Notes

LAYERS = 3
PRICES = {bits: packed_share(bits) for bits in BITS}
PROMPTS = (PromptShape(2, 40, 6), PromptShape(3, 35, 8))


def evidence(seed: int = 0, layers: int = LAYERS) -> Evidence:
    """Convex damage curves over kept shares, and damage that grows as bits fall."""
    rng = np.random.default_rng(seed)
    levels = np.array(LEVELS)
    height, fall = rng.uniform(0.01, 1, (layers, 1)), rng.uniform(1, 20, (layers, 1))
    harm = np.cumsum(rng.exponential(0.01, (layers, len(FEWER))), axis=1)
    return Evidence(
        layers=layers,
        tokens=40,
        damage=height * (np.exp(-fall * levels) - np.exp(-fall)),
        damage_levels=levels,
        bit_damage=harm,
        bit_levels=np.array(FEWER, dtype=float),
    )


def cost(known: Evidence, layer: int, share: float, bits: int) -> float:
    """What the probe says that a layer's tokens and bits cost."""
    curve = np.interp(share, LEVELS, known.damage[layer])
    noise = 0.0 if bits == 16 or not share else known.bit_damage[layer, FEWER.index(bits)]
    return float(curve + noise)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("room", [0.05, 0.2, 0.5])
def test_no_split_that_takes_as_little_does_less_damage(seed: int, room: float) -> None:
    """Against all combinations of a coarse grid of shares and all bits, two layers at a time."""
    known = evidence(seed, layers=2)
    shares, bits = split_bytes(known, room, PRICES)
    paid = sum(PRICES[b] * k for k, b in zip(shares, bits, strict=True))
    assert paid <= 2 * room + 1e-9
    ours = sum(cost(known, layer, k, b) for layer, (k, b) in enumerate(zip(shares, bits, strict=True)))
    options = [(k, b) for k in np.linspace(0, 1, 41) for b in BITS]
    prices = np.array([k * PRICES[b] for k, b in options])
    first, second = (np.array([cost(known, layer, k, b) for k, b in options]) for layer in range(2))
    whole = first[:, None] + second[None]
    allowed = prices[:, None] + prices[None] <= paid + 1e-9
    assert ours <= whole[allowed].min() + 1e-9


def test_a_split_needs_a_probe_in_bits() -> None:
    with pytest.raises(UserError, match="a sensitivity probe in tokens and in bits"):
        split_bytes(replace(evidence(), bit_damage=None), 0.5, PRICES)
    shares, bits = split_bytes(evidence(), 1.0, {16: 1.0, 4: PRICES[4]})
    assert bits == (16, 16, 16)
    assert shares.tolist() == [1.0, 1.0, 1.0]
    assert set(split_bytes(evidence(), 0.1, {16: 1.0, 4: PRICES[4]})[1]) <= {16, 4}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("governed", [None, (0, 2)])
def test_a_policy_with_split_bytes_meets_the_budget(seed: int, governed) -> None:
    known = replace(evidence(seed), governed=governed)
    prompts = tuple(replace(prompt, governed=governed) for prompt in PROMPTS)
    base = Policy(vision_keep=0.3, vision_bits=4, scorer=ScorerSpec.of("valued:instruction"), heads="kv_head")
    budget = Budget(0.35, None, prompts, 5)
    found = split_by_probe(base, known, budget)
    assert found is not None
    assert (found.scorer, found.heads, found.text) == (base.scorer, base.heads, base.text)
    used = live_share(found, prompts, LAYERS)
    grain = max(PRICES.values()) * sum(len(prompts) for _ in range(LAYERS))
    total = sum(len(prompt.layers(LAYERS)) * prompt.total for prompt in prompts)
    full = all(size.vision == p.vision for p in prompts for size in sizes(found, p, LAYERS) if size.system)
    assert used <= 0.35
    assert full or used > 0.35 - grain / total
    assert split_by_probe(base.model_copy(update={"vision_bits": 16}), known, budget) is None
    assert split_by_probe(base, replace(known, bit_damage=None), budget) is None, "a study of before"


class Additive(ByParts):
    """Damage of a policy is what the probe says of its layers, added up."""

    samples = ("a", "b")

    def __init__(self, known: Evidence) -> None:
        self.known, self.calls = known, 0

    def score_many(self, policies):
        self.calls += len(policies)
        return [[ForcedScore(n, self.damage(p), 1.0, 0.0, 3) for n in self.samples] for p in policies]

    def damage(self, policy) -> float:
        values = zip(policy.keep(LAYERS), policy.bits(LAYERS), strict=True)
        return sum(cost(self.known, layer, k, b) for layer, (k, b) in enumerate(values))

    def parts(self, policy):
        yield from self.score_many([policy])


def test_the_probe_in_bits_is_measured_once_and_added_to_one_in_tokens(tmp_path) -> None:
    known = evidence()
    bare = Evidence(layers=LAYERS, tokens=40)
    forced, notes, path = Additive(known), Notes(), tmp_path / "probe.json"
    first = probed(bare, forced, path)
    assert first.bit_damage is None
    assert forced.calls == LAYERS * (len(LEVELS) - 1)
    both = probed(bare, forced, path, notes, bits=True)
    assert notes.counts("probe of bits")[-1] == (LAYERS * len(FEWER), LAYERS * len(FEWER))
    np.testing.assert_allclose(both.damage, known.damage, atol=1e-12)
    np.testing.assert_allclose(both.bit_damage, known.bit_damage, atol=1e-12)
    calls = forced.calls
    again = parse_evidence(dump_evidence(probed(bare, forced, path, bits=True)), "x")
    assert forced.calls == calls
    assert (again.bit_damage == both.bit_damage).all()
    note = json.loads(path.read_text()) | {"bit_damage": [[0.1]]}
    path.write_text(json.dumps(note))
    with pytest.raises(UserError, match="is not of 3 layers"):
        probed(bare, forced, path, bits=True)


def test_refinement_starts_from_both_and_moves_either(tmp_path) -> None:
    known = evidence(1)
    budget = Budget(0.3, None, PROMPTS, 5)
    base = Policy(name="tuned", vision_keep=0.4, vision_bits=4)
    still = LayerSpace(base, LAYERS, False).starts()[0].policy(known, budget)
    objective = Objective(Additive(known), known, budget, LayerSpace(base, LAYERS, False))
    first = optuna.create_study(directions=["minimize"])
    first.enqueue_trial(objective.space.starts()[0].params(budget))
    first.optimize(lambda trial: scored_alone(objective, trial), n_trials=1)
    study = refine(tmp_path, Settings(trials=20, refine=10, prune=False), objective, first.trials[0])
    trials = study.get_trials()
    assert [trial.params["bits"] for trial in trials[:2]] == [SAME, SPLIT]
    assert trials[0].user_attrs["policy"] == first.trials[0].user_attrs["policy"]
    assert trials[1].value < trials[0].value, "where damage adds up the split is better"
    assert trials[1].value == pytest.approx(Additive(known).damage(split_by_probe(still, known, budget)))
    assert all(trial.user_attrs["live_share"] <= 0.3 for trial in trials)
    # a refinement that was begun without the probe in bits goes on without
    old = replace(objective, evidence=replace(known, bit_damage=None, bit_levels=None))
    plain = refine(tmp_path / "old", Settings(trials=20, refine=3, prune=False), old, first.trials[0])
    assert not any("bits" in trial.params for trial in plain.get_trials())


def test_cmaes_takes_over_from_the_gaussian_process(monkeypatch) -> None:
    """It begins where the best trials are, keeps their choices, and a study that is resumed goes on alike."""
    pytest.importorskip("cmaes")
    monkeypatch.setattr(tuning_settings, "MOST_BY_GP", 40)
    names = [f"keep_{i}" for i in range(3)]
    kinds = {name: optuna.distributions.FloatDistribution(-1, 1) for name in names}
    kinds |= {"bits": optuna.distributions.CategoricalDistribution((SAME, SPLIT))}
    rng = np.random.default_rng(0)

    def value(params) -> float:
        return sum((params[name] - 0.5) ** 2 for name in names) + (params["bits"] == SAME)

    def run(count: int, parts: int) -> list[float]:
        study = optuna.create_study()
        study.add_trials(done)
        for _ in range(parts):
            for _ in range(count // parts):
                trials = study.get_trials(deepcopy=False)
                study.sampler = make_sampler("gp", len(trials), trials)
                study.optimize(lambda trial: value(asked(trial)), n_trials=1)
        new = study.get_trials()[len(done) :]
        assert {trial.params["bits"] for trial in new} == {SPLIT}
        return [trial.value for trial in new]

    def asked(trial) -> dict:
        return {name: trial._suggest(name, kind) for name, kind in kinds.items()}

    done = []
    for _ in range(40):
        params = {name: float(rng.uniform(-1, 1)) for name in names} | {
            "bits": str(rng.choice([SAME, SPLIT]))
        }
        done.append(optuna.trial.create_trial(params=params, distributions=kinds, value=value(params)))
    found = run(60, 1)
    assert np.mean(found[-20:]) < 0.3 * np.mean(
        [trial.value for trial in done if trial.params["bits"] == SPLIT]
    )
    assert found == run(60, 3)
    assert type(make_sampler("gp", 0, done[:39])).__name__ == "GPSampler"
