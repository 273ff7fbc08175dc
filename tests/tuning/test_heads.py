"""The stage that moves KV heads: what a point means, where it starts, and that a study of it resumes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch

from avlprof.attention.ranking import best_pairs
from avlprof.errors import UserError
from avlprof.plots.layers import policy_layers_info
from avlprof.policy import Policy, PromptShape, ScorerSpec, dump_policy, live_share, parse_policy, sizes
from avlprof.runtime.forced import ForcedScore
from avlprof.testing.allocators import random_evidence
from avlprof.tuning import Budget, Settings, Space
from avlprof.tuning.evidence import dump_evidence, parse_evidence
from avlprof.tuning.objective import Objective
from avlprof.tuning.refine import HeadSpace, MovedHeads, is_refined, moves_heads, refine_heads
from avlprof.tuning.rivals import SAME, rivals
from avlprof.tuning.study import StudyMeta, as_begun, finalists
from tests.search_space import ByParts
from tests.watching import Notes

LAYERS, HEADS = 4, 3
PROMPTS = (PromptShape(2, 40, 6), PromptShape(3, 35, 8))
BUDGET = Budget(0.5, None, PROMPTS, 5)
BASE = Policy(
    name="tuned",
    vision_keep=(0.2, 0.5, 1.0, 0.31),
    vision_bits=(4, 4, 3, 8),
    scorer=ScorerSpec.of("valued:instruction"),
    heads="kv_head",
)
TRACED = ((0.5, 1.0, 1.5), (1.2, 0.9, 0.9), (1.0, 1.0, 1.0), (0.25, 2.0, 0.75))
EVIDENCE = replace(random_evidence(LAYERS, 40, np.random.default_rng(0)), head_shares=np.array(TRACED))
GOAL = np.array(((0.4, 1.4, 1.2), (1.0, 1.5, 0.5), (1, 1, 1), (0.6, 0.6, 1.8)))


class FromGoal(ByParts):
    """Damage is the squared distance of a policy's head shares from `GOAL`, plus what the floor leaves."""

    samples = ("a", "b")

    def __init__(self):
        self.calls = 0

    def damage(self, policy):
        shares = np.array(policy.head_shares or ((1.0,) * HEADS,) * LAYERS)
        return float(((shares - GOAL) ** 2).sum()) + (policy.heads == "adaptive") * (1 - policy.head_floor)

    def score_many(self, policies):
        self.calls += len(policies)
        return [[ForcedScore(n, self.damage(p), 1.0, 0.0, 3) for n in self.samples] for p in policies]

    def parts(self, policy):
        yield from self.score_many([policy])


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_moved_by_exp_over_their_mean_at_the_same_bytes(seed):
    """Against the formula, head by head; and pairs that the rule then chooses, row by row."""
    rng = np.random.default_rng(seed)
    steps = rng.uniform(-1, 1, (LAYERS, HEADS))
    policy = MovedHeads(BASE, TRACED, tuple(map(tuple, steps)), 1.0).policy(EVIDENCE, BUDGET)
    for layer in range(LAYERS):
        raw = [TRACED[layer][h] * math.exp(steps[layer][h]) for h in range(HEADS)]
        wanted = [value * HEADS / sum(raw) for value in raw]
        assert policy.head_shares[layer] == pytest.approx(wanted, abs=1e-4)
    again = parse_policy(dump_policy(policy))  # the schema checks that means are 1
    assert again.hash == policy.hash
    assert live_share(policy, PROMPTS, LAYERS) == live_share(BASE, PROMPTS, LAYERS)
    for prompt in PROMPTS:
        assert sizes(policy, prompt, LAYERS) == sizes(BASE, prompt, LAYERS)
    layer, count = 1, sizes(BASE, PROMPTS[0], LAYERS)[1].vision
    scores = torch.rand(1, HEADS, 40, generator=torch.Generator().manual_seed(seed))
    parts = policy.head_parts(layer, HEADS)
    kept = best_pairs(scores, torch.ones(1, 1, 40, dtype=torch.bool), torch.tensor([count]), parts)
    assert kept.sum() == HEADS * count
    for head, own in enumerate(kept[0].sum(dim=-1).tolist()):
        assert 0 <= own - math.floor(parts[head] * count + 1e-6) < HEADS


def test_starts_are_the_winner_the_traced_shares_and_the_plain_rule():
    space = HeadSpace(BASE, LAYERS, HEADS, TRACED)
    winner, traced, plain = (start.policy(EVIDENCE, BUDGET) for start in space.starts())
    assert dump_policy(winner) == dump_policy(BASE)
    assert (traced.heads, traced.head_floor, traced.head_shares) == ("adaptive", 1.0, TRACED)
    assert (plain.heads, plain.head_floor, plain.head_shares) == ("adaptive", 0.2, None)
    names = set(space.starts()[0].params(BUDGET))
    assert names == {"head_floor", "head_shares", *(f"head_{i}_{h}" for i in (0, 1, 3) for h in (0, 1))}
    without = HeadSpace(BASE, LAYERS, HEADS).starts()
    assert len(without) == 2
    assert "head_shares" not in without[0].params(BUDGET)
    already = HeadSpace(BASE.model_copy(update={"heads": "adaptive"}), LAYERS, HEADS).starts()
    assert [start.floor for start in already] == [0.2]
    shared = HeadSpace(BASE.model_copy(update={"heads": "shared"}), LAYERS, HEADS).starts()
    assert shared[0].policy(EVIDENCE, BUDGET).heads == "kv_head"


def first_study(policy):
    study = optuna.create_study()
    study.add_trial(
        optuna.trial.create_trial(
            value=FromGoal().damage(policy), user_attrs={"policy": dump_policy(policy), "complete": True}
        )
    )
    return study


@pytest.mark.full  # three seconds of Gaussian processes
def test_a_stage_improves_resumes_and_is_deterministic(tmp_path):
    first = first_study(BASE)
    base = first.trials[0]
    settings = Settings(trials=40, refine=0, refine_heads=12, prune=False)

    def run(folder, trials=12, scores=None):
        objective = Objective(scores or FromGoal(), EVIDENCE, BUDGET, HeadSpace(BASE, LAYERS, HEADS, TRACED))
        return refine_heads(folder, replace(settings, refine_heads=trials), objective, base, HEADS)

    study = run(tmp_path / "a")
    trials = study.get_trials()
    assert len(trials) == 12
    assert all(moves_heads(trial) and not is_refined(trial) for trial in trials)
    assert [trial.params["head_shares"] for trial in trials[:3]] == ["even", "traced", "even"]
    assert min(trial.value for trial in trials) < min(trial.value for trial in trials[:3])
    used = live_share(BASE, PROMPTS, LAYERS)
    assert {trial.user_attrs["live_share"] for trial in trials} == {used}
    run(tmp_path / "b", 5)
    values = [trial.value for trial in trials]
    assert [trial.value for trial in run(tmp_path / "b").get_trials()] == values
    again = FromGoal()
    assert [trial.value for trial in run(tmp_path / "a", scores=again).get_trials()] == values
    assert again.calls == 0
    assert next((tmp_path / "a" / "heads").iterdir()).name == BASE.hash
    # the policy that the stage begins with counts as the trial that found it
    both = finalists(first, 20, study)
    assert [trial for trial in both if trial.user_attrs["policy"] == dump_policy(BASE)] == [base]


def test_heads_that_have_nothing_to_give_are_left_alone(tmp_path):
    whole = BASE.model_copy(update={"vision_keep": (1.0, 1.0, 0.0, 1.0)})
    objective = Objective(FromGoal(), EVIDENCE, BUDGET, HeadSpace(whole, LAYERS, HEADS))
    notes = Notes()
    settings = Settings(trials=9, refine=0, refine_heads=3)
    base = first_study(whole).trials[0]
    assert refine_heads(tmp_path, settings, objective, base, HEADS, notes) is None
    assert notes.sentences == [
        "no trial moves heads: the best policy keeps all or nothing in every layer, so its heads have "
        "nothing to give each other"
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"refine_heads": -1}, r"refine_heads must be 0 or more and below trials \(50\), got -1"),
        ({"refine_heads": 50}, "refine_heads must be 0 or more"),
        (
            {"refine_heads": 30, "refine": 20},
            r"refine must be 0 or more and below trials less refine_heads \(20",
        ),
        ({"refine_heads": 5, "read_budget": 0.1}, "refine_heads does not go with a read budget"),
    ],
)
def test_what_does_not_go_together_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        Settings(**values)


def test_trials_are_split_into_three_stages():
    settings = Settings(trials=90, refine_heads=30)
    assert (settings.scalar, settings.refining, settings.refine_heads) == (40, 20, 30)
    assert not Settings(trials=73, refine_heads=30).missed(28)
    assert "73 trials or more" in Settings(trials=72, refine_heads=30).missed(28)


def test_evidence_holds_what_heads_need():
    again = parse_evidence(dump_evidence(EVIDENCE), "x")
    assert (again.head_shares == EVIDENCE.head_shares).all()
    own = replace(EVIDENCE, governed=(0, 3)).of_governed()
    assert own.head_shares.tolist() == [list(TRACED[0]), list(TRACED[3])]


def test_no_rival_has_the_heads_of_the_winner():
    winner = BASE.model_copy(update={"vision_keep": 0.4, "vision_bits": 4})
    winner = MovedHeads(winner, TRACED, ((0.0,) * HEADS,) * LAYERS, 1.0).policy(EVIDENCE, BUDGET)
    others = {rival.name: rival for rival in rivals(winner, BUDGET, LAYERS)}
    assert all(rival.head_shares is None for rival in others.values())
    assert (others[SAME].heads, others[SAME].vision_bits) == ("kv_head", 4)


def test_the_figure_of_layers_marks_heads_with_shares_of_their_own():
    policy = MovedHeads(BASE, TRACED, ((0.0,) * HEADS,) * LAYERS, 0.5).policy(EVIDENCE, BUDGET)
    panel = policy_layers_info(policy).panels[0]
    wanted = [
        [min(keep * share, 1.0) for share in own] for keep, own in zip(BASE.keep(4), TRACED, strict=True)
    ]
    np.testing.assert_allclose(panel.heads, wanted)
    assert panel.head_floor == 0.5
    assert policy_layers_info(BASE).panels[0].heads is None


def test_a_study_of_before_layers_led_goes_on_without(tmp_path):
    noted = Space().described()
    del noted["leaders"]
    fields = dict.fromkeys(("model", "model_hash", "task", "split", "sample_hash", "dtype", "run_hash"), "x")
    numbers = {"samples": 1, "max_new_tokens": 2, "budget": 0.1, "read_budget": None, "seed": 0}
    meta = StudyMeta(**fields, **numbers, space=noted)
    (tmp_path / "study.json").write_text(meta.model_dump_json())
    assert as_begun(tmp_path, Settings()).space.described() == noted
    asked = Settings(space=Space(leaders=(0, 2)))
    assert as_begun(tmp_path, asked) == asked
