"""Objectives and samplers: what a trial's value is, and that every sampler is seeded and bounded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.evaluation import AnswerSettings, AnswerStore, generate_answers
from avlprof.plots.knobs import knob_effects, knob_effects_info
from avlprof.policy import Policy, PromptShape, live_share, parse_policy, read_share
from avlprof.runtime.forced import ForcedScore, ForcedSet
from avlprof.tasks import load_task
from avlprof.testing.allocators import random_evidence
from avlprof.tuning import Budget, Candidate, Settings, Space
from avlprof.tuning.importance import PLAIN
from avlprof.tuning.importance import knob_effects as measured_effects
from avlprof.tuning.objective import OBJECTIVES, Objective
from avlprof.tuning.prepared import Generated, Prepared
from avlprof.tuning.refine import LayerSpace, is_refined, refine
from avlprof.tuning.settings import SAMPLERS, make_sampler
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.study import read_study
from avlprof.tuning.trials import run_trials
from tests.helpers import thinned
from tests.search_space import ByParts, scored_alone
from tests.watching import Notes

LAYERS = 4
BUDGET = Budget(0.4, None, (PromptShape(2, 40, 6),), 5)
EVIDENCE = random_evidence(LAYERS, 40, np.random.default_rng(3))
SPACE = Space(("uniform", "pyramid", "coverage"), ("last_query", "instruction")).within(BUDGET, LAYERS)
BEST = np.array([0.05, 0.7, 0.3, 0.4])


@dataclass
class Distance(ByParts):
    """Damage is the squared distance of the kept shares from `BEST`, which no allocator hits."""

    samples: tuple[str, ...] = ("a", "b")
    calls: int = 0

    def parts(self, policy):
        self.calls += 1
        gap = float(((np.array(policy.keep(LAYERS)) - BEST) ** 2).sum())
        yield [ForcedScore(name, gap * (1 + i), 1.0, -gap, 3) for i, name in enumerate(self.samples)]

    def score(self, policy):
        return next(self.parts(policy))


@dataclass
class Fewer(Distance):
    """Of which so many steps refresh where that is triggered; more with a larger core, or fewer."""

    slope: float = 0.0

    def refreshed(self, policy):
        core = np.array(policy.compute(LAYERS)) / np.array(policy.keep(LAYERS))
        return tuple(np.clip(0.3 + self.slope * core, 0.0, 1.0))


def objective(kind="fidelity", scores=None, space=SPACE, budget=BUDGET):
    return Objective(scores or Distance(), EVIDENCE, budget, space, kind)


# --- values ---


def test_each_objective_is_lower_when_it_is_better():
    close, far = ForcedScore("a", 0.1, 1.0, -0.5, 3), ForcedScore("a", 0.7, 0.5, -2.0, 3)
    assert OBJECTIVES["fidelity"](close) == 0.1 < OBJECTIVES["fidelity"](far)
    assert OBJECTIVES["likelihood"](close) == 0.5 < OBJECTIVES["likelihood"](far) == 2.0


@pytest.fixture(scope="module")
def few():
    return load_task("shapes:read,color").samples("search", 6)


def test_likelihood_is_that_of_the_references(tiny, few):
    """Against one plain forward of prompt and reference under the dense model."""
    forced = ForcedSet.prepare(tiny, few, max_new_tokens=8, answers="reference")
    dense = forced.score(Policy(vision_keep=1.0))
    for sample, answer, score in zip(few, forced.answers, dense, strict=True):
        inputs = tiny.adapter.encode([sample.prompt], [sample.open_images()])
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            logits = tiny.model(**whole).logits[0].float().log_softmax(dim=-1)
        start = inputs["input_ids"].shape[1]
        wanted = float(np.mean([logits[at - 1, ids[0, at]] for at in range(start, ids.shape[1])]))
        assert score.log_likelihood == pytest.approx(wanted, abs=1e-4)
    reference = few[0].answers[0]
    assert tiny.adapter.decode([forced.answers[0]])[0].startswith(reference[:3])


@pytest.mark.full  # a whole search
def test_accuracy_is_the_metric_of_real_answers(tiny, few, tmp_path):
    task = load_task("shapes:read,color")
    lengths = {sample.id: 200 for sample in few}
    made = Generated(tiny, few, AnswerSettings(8, 32, task.metric, lengths), AnswerStore(tmp_path))
    evidence = Evidence(layers=6, tokens=196)
    budget = Budget(0.3, None, (PromptShape(3, 196, 9),), 6)
    space = Space(("uniform", "pyramid"), ("last_query",), ("shared",)).within(budget, 6)
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    starts = space.starts()
    for start in starts:
        study.enqueue_trial(start.params(budget))
    scored = Objective(made, evidence, budget, space, "accuracy")
    study.optimize(lambda trial: scored_alone(scored, trial), n_trials=len(starts))
    for trial in study.trials:
        policy = parse_policy(trial.user_attrs["policy"])
        answers = generate_answers(tiny, few, policy, AnswerSettings(8, 1, task.metric))
        assert trial.value == pytest.approx(1 - np.mean([answer.score for answer in answers]))
        assert trial.user_attrs["complete"]
    assert made.metric(None).shape == (6,)


# --- samplers ---


def installed(name):
    return name != "cmaes" or importlib.util.find_spec("cmaes") is not None


@pytest.mark.parametrize("name", thinned(SAMPLERS, ("tpe", "cmaes", "random"), ("tpe",)))
def test_every_sampler_is_seeded_and_stays_in_the_space(name, tmp_path):
    if not installed(name):
        with pytest.raises(UserError, match="needs the package cmaes"):
            make_sampler(name, 0)
        return

    def run(folder, seed):
        folder.mkdir()
        trials = len(SPACE.starts()) + 3
        settings = Settings(trials=trials, refine=0, sampler=name, seed=seed, prune=False)
        study = run_trials(FolderStorage(folder), settings, objective())
        return [(trial.params, trial.value) for trial in study.get_trials()]

    first = run(tmp_path / "a", 0)
    assert run(tmp_path / "b", 0) == first
    assert run(tmp_path / "c", 1) != first
    starts = len(SPACE.starts())
    for params, _ in first[starts:]:
        assert params["allocator"] in SPACE.allocators
        assert 0 <= params["mix"] <= 1
        assert 0.25 <= params["temperature"] <= 4


# --- the second stage ---


@pytest.mark.parametrize("read", thinned([None, 0.3], [None, 0.3], [0.3]))
def test_refinement_starts_from_the_winner_and_improves_on_it(tmp_path, read):
    budget = replace(BUDGET, read=read)
    space = SPACE.within(budget, LAYERS)
    settings = Settings(trials=18, refine=10, prune=False)
    tmp_path.joinpath("s").mkdir()
    first = run_trials(
        FolderStorage(tmp_path / "s"),
        replace(settings, trials=8, refine=0),
        objective(space=space, budget=budget),
    )
    base = min(first.get_trials(), key=lambda trial: trial.value)
    notes = Notes()
    second = refine(tmp_path / "s", settings, objective(space=space, budget=budget), base, notes)
    trials = second.get_trials()
    assert len(trials) == 10
    assert notes.phases[-1] == ("trials", 10, 10)
    assert all(is_refined(trial) for trial in trials)
    assert not any(is_refined(trial) for trial in first.get_trials())
    assert trials[0].user_attrs["policy"] == base.user_attrs["policy"]
    assert min(trial.value for trial in trials) < base.value
    again = Distance()
    same = refine(tmp_path / "s", settings, objective(scores=again, space=space, budget=budget), base)
    assert again.calls == 0
    assert [trial.value for trial in same.get_trials()] == [trial.value for trial in trials]
    folder = next((tmp_path / "s" / "refined").iterdir())
    assert len(read_study(folder).get_trials()) == 10
    assert folder.name == parse_policy(base.user_attrs["policy"]).hash


def test_layers_without_vision_can_come_back():
    base = Policy(vision_keep=(0.0, 0.5, 0.5, 0.6))
    space = LayerSpace(base, LAYERS, False)
    still = space.starts()[0].policy(EVIDENCE, BUDGET)
    up = replace(space.starts()[0], keep=(1.0, -1.0, -1.0, -1.0)).policy(EVIDENCE, BUDGET)
    assert up.keep(LAYERS)[0] >= still.keep(LAYERS)[0]
    assert sum(up.keep(LAYERS)) == pytest.approx(sum(still.keep(LAYERS)), abs=0.06)


# --- what a knob is worth ---


class Cheap:
    """Scores of a prepared set: the distance from `BEST`, a little different by sample."""

    evidence = EVIDENCE

    def cheap_scores(self, policies, watch):
        watch.phase("scores", 2 * len(policies), 3 * len(policies))
        return [self.cheap(policy) for policy in policies]

    def cheap(self, policy):
        gap = ((np.array(policy.keep(LAYERS)) - BEST) ** 2).sum() + 0.1 * (
            policy.scorer.name != "instruction"
        )
        return gap * np.array([1.0, 1.1, 0.9])


def test_knobs_are_put_back_one_at_a_time():
    winner = Candidate("pyramid", temperature=0.5, scorer="instruction")
    notes = Notes()
    table = measured_effects(winner, Cheap(), BUDGET, notes).set_index("knob")
    assert set(table.index) == {"allocator", "temperature", "scorer"}
    assert notes.counts("knobs") == [(8, 12)]  # of the winner as well, in three samples each
    ours = Cheap().cheap(winner.policy(EVIDENCE, BUDGET)).mean()
    for name, row in table.iterrows():
        back = replace(winner, **{name: PLAIN[name]})
        wanted = Cheap().cheap(back.policy(EVIDENCE, BUDGET)).mean() - ours
        assert row["change"] == pytest.approx(wanted)
        assert row["low"] <= row["change"] <= row["high"]
    assert table.loc["scorer", "change"] == pytest.approx(0.1)
    assert (table["change"].diff().dropna() <= 0).all()
    assert measured_effects(Candidate(), Cheap(), BUDGET).empty
    small = replace(BUDGET, memory=live_share(Policy(vision_keep=0.0), BUDGET.prompts, LAYERS) * 0.9)
    few = Candidate(scorer="instruction", vision_bits=4, text_bits=4)
    assert set(measured_effects(few, Cheap(), small)["knob"]) == {"scorer", "vision_bits"}
    assert set(measured_effects(few, Cheap(), BUDGET)["knob"]) == {"scorer", "vision_bits", "text_bits"}


def test_the_figure_of_knobs_says_both_values():
    frame = pd.DataFrame(
        {
            "knob": ["mix", "scorer"],
            "value": ["0.3", "instruction"],
            "plain": ["1", "last_query"],
            "change": [-0.01, 0.2],
            "low": [-0.02, 0.1],
            "high": [0.0, 0.3],
        }
    )
    info = knob_effects_info(frame)
    assert info.knobs == ("scorer: instruction (plain: last_query)", "mix: 0.3 (plain: 1)")
    assert info.change.tolist() == [0.2, -0.01]
    figure = knob_effects(info)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.2, -0.01]
    with pytest.raises(UserError, match="knob effects"):
        knob_effects_info(frame.drop(columns="plain"))


def test_dense_answers_are_judged_as_generated_ones(tiny, few, tmp_path):
    task = load_task("shapes:read,color")
    forced = ForcedSet.prepare(tiny, few, max_new_tokens=8)
    made = Prepared(tiny, task, few, 8, "fidelity", forced, Evidence(layers=6, tokens=196))
    wanted = made.generated(AnswerStore(tmp_path)).metric(None)
    np.testing.assert_array_equal(made.dense_metric(AnswerStore(tmp_path / "other")), wanted)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("slope", [0.0, -0.3, 0.5, 5.0])
def test_triggered_refreshes_are_paid_as_often_as_they_happen(slope):
    """A core as large as measured refreshes leave room for; where its own take more, a smaller one."""
    budget = Budget(0.5, 0.3, (PromptShape(2, 40, 6),), 12)
    space = Space(("uniform",), ("last_query",), bits=(16,), text_bits=(16,), refresh=("triggered",))
    space = space.within(budget, LAYERS)
    scores = Fewer(slope=slope)
    ours = objective(scores=scores, space=space, budget=budget)
    point = Candidate(refresh_interval=2, refresh="triggered", refresh_margin=0.2, scorer="last_query")
    policy, rates = ours.policy(point)
    assert policy.refresh_margin == 0.2 and rates == scores.refreshed(policy)
    assert read_share(policy, list(budget.prompts), LAYERS, 12, rates) <= 0.3
    bound = point.policy(EVIDENCE, budget)
    assert read_share(bound, list(budget.prompts), LAYERS, 12) <= 0.3
    cores = [sum(one.compute(LAYERS)) for one in (policy, bound)]
    assert cores[0] > cores[1] if slope < 5 else cores[0] == cores[1]
    trial = optuna.create_study().ask()
    scored_alone(ours, trial)
    assert trial.user_attrs["read_share"] <= 0.3
