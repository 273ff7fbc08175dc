"""Tuning: the search space against budgets, trials against a plain score, interruption against none."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from typer.testing import CliRunner

import avlprof
from avlprof.allocators import Evidence
from avlprof.allocators.sensitivity import Sensitivity
from avlprof.cli.app import app
from avlprof.errors import UserError
from avlprof.evaluation import generate_answers
from avlprof.models import load_model
from avlprof.policy import (
    Policy,
    PromptShape,
    ScorerSpec,
    TextPolicy,
    dump_policy,
    live_share,
    load_policy,
    parse_policy,
    read_share,
)
from avlprof.runs.lock import FolderLock
from avlprof.runtime.forced import ForcedScore, ForcedSet
from avlprof.search import study_name
from avlprof.search import tune as tune_verb
from avlprof.tasks import load_task
from avlprof.testing.allocators import random_evidence
from avlprof.traced import Run
from avlprof.tuning import Budget, Candidate, Settings, Space, export_policy, read_meta, read_study
from avlprof.tuning.finalists import finalists
from avlprof.tuning.layers import Moved
from avlprof.tuning.objective import Objective
from avlprof.tuning.places import JOURNAL
from avlprof.tuning.probe import LEVELS, probed
from avlprof.tuning.rivals import rivals
from avlprof.tuning.trials import run_trials

ALLOCATORS = ("uniform", "pyramid", "coverage", "sensitivity")
SPACE = Space(ALLOCATORS, ("last_query", "instruction", "accumulated", "key_diversity", "value_norm"))
TASK, SAMPLES, LIMIT = "shapes:read", 6, 6
BUDGET, READ = 0.4, 0.35


def probed_evidence(layers, count, seed):
    """Random evidence with damage at the levels of the probe."""
    rng = np.random.default_rng(seed)
    damage = np.sort(rng.exponential(size=(layers, len(LEVELS))), axis=1)[:, ::-1].copy()
    damage[:, -1] = 0.0
    return replace(random_evidence(layers, count, rng), damage=damage, damage_levels=np.array(LEVELS))


# --- candidates and space ---


@pytest.mark.parametrize("seed", range(40))
def test_every_candidate_meets_its_budgets(seed):
    rng = np.random.default_rng(seed)
    layers, count = int(rng.integers(1, 9)), int(rng.integers(4, 60))
    evidence = probed_evidence(layers, count, seed)
    # one shape, or several: then each prompt rounds down by itself
    sizes = [count] if seed % 2 else [count, *rng.integers(1, count + 1, size=2).tolist()]
    prompts = tuple(PromptShape(int(rng.integers(0, 4)), n, int(rng.integers(1, 6))) for n in sizes)
    window = seed % 3 == 0
    text = TextPolicy(window=1) if window else TextPolicy()
    always = live_share(Policy(vision_keep=0.0, text=text), prompts, layers)
    memory = float(rng.uniform(always, 1.0))
    read = float(rng.uniform(always, 1.0)) if seed % 4 > 1 else None
    budget = Budget(memory, read, prompts, int(rng.integers(1, 12)))
    space = Space(text="trade" if window else "all").within(budget, layers).supported(evidence)
    dense = layers * sum(prompt.total for prompt in prompts)
    slack = layers * len(prompts) / dense
    for _ in range(6):
        candidate = Candidate(
            allocator=str(rng.choice(space.allocators)),
            mix=float(rng.uniform()),
            temperature=float(rng.uniform(0.25, 4)),
            floor=float(rng.uniform(0, min(0.1, memory))),
            midpoint=float(rng.uniform(0.05, 0.95)),
            scorer=str(rng.choice(space.scorers)),
            heads=str(rng.choice(space.heads)),
            refresh_interval=int(rng.choice(space.refreshes)),
            refresh=str(rng.choice(space.refresh)),
            compute_temperature=float(rng.uniform(0.25, 4)),
            text_share=float(rng.uniform(0.02, 1)) if window else None,
            text_sink=int(rng.integers(0, 5)) if window else 0,
        )
        policy = candidate.policy(evidence, budget)
        check_budgets(policy, budget, layers, slack)
        assert policy.scorer.name == candidate.scorer.partition(":")[0]
        assert policy.heads == candidate.heads
        if not window:
            assert policy.text == TextPolicy()
        elif policy.text.window is not None:
            asked = max(round(candidate.text_share * budget.text_room), 1)
            assert policy.text.window <= asked
            assert policy.text.sink <= candidate.text_sink
        if read is not None:
            assert policy.refresh_interval == candidate.refresh_interval
            moved = Moved(policy, *(tuple(rng.uniform(-1, 1, layers)) for _ in range(2)))
        else:
            moved = Moved(policy, tuple(rng.uniform(-1, 1, layers)))
        found = moved.policy(evidence, budget)
        check_budgets(found, budget, layers, slack)
        assert (found.text, found.scorer, found.refresh) == (policy.text, policy.scorer, policy.refresh)


def check_budgets(policy, budget, layers, slack):
    """Never above a budget, and at most one token a layer and prompt below, unless all is kept or read."""
    live = live_share(policy, budget.prompts, layers)
    assert live <= budget.memory
    assert live > budget.memory - slack - 1e-9 or set(policy.keep(layers)) == {1.0}
    if budget.read is None:
        assert policy.compute(layers) == policy.keep(layers)
        return
    used = read_share(policy, budget.prompts, layers, budget.answer_tokens)
    assert used <= budget.read
    assert used > budget.read - slack - 1e-9 or policy.compute(layers) == policy.keep(layers)


def test_a_budget_below_the_text_cuts_the_text():
    """80 text tokens of 100: at 30% a window must do, and `all` refuses."""
    prompts, layers = (PromptShape(2, 18, 80),), 3
    evidence = probed_evidence(layers, 18, 1)
    for read in (None, 0.2):
        budget = Budget(0.3, read, prompts, 8)
        space = Space().within(budget, layers).supported(evidence)
        assert space.text == "trade"
        for start in space.starts():
            policy = start.policy(evidence, budget)
            assert 0 < policy.text.window <= 30 - 2
            check_budgets(policy, budget, layers, layers / 100)
        with pytest.raises(UserError, match=r"^budget 0\.3 is below 0\.82, what system and text alone need"):
            Space(text="all").within(budget, layers)
    assert Space().within(Budget(0.9, None, prompts, 8), layers).text == "all"
    assert Space(text="trade").within(Budget(0.9, None, prompts, 8), layers).text == "trade"
    with pytest.raises(UserError, match=r"^budget 0\.01 is below 0\.03"):
        Space().within(Budget(0.01, None, prompts, 8), layers)


def test_a_start_that_keeps_all_text_is_the_policy_without_a_window():
    prompts = (PromptShape(1, 30, 9), PromptShape(1, 30, 5))
    budget, evidence = Budget(0.6, None, prompts, 7), probed_evidence(3, 30, 1)
    all_of_it = Candidate(text_share=1.0).policy(evidence, budget)
    assert all_of_it.hash == Candidate().policy(evidence, budget).hash
    some = Candidate(text_share=0.25).policy(evidence, budget)
    assert some.text.window == 4
    assert sum(some.keep(3)) > sum(all_of_it.keep(3))


def test_allocators_without_evidence_are_left_out():
    bare = Evidence(layers=4, tokens=30)
    assert Space().supported(bare).allocators == ("uniform", "pyramid", "sigmoid")
    with pytest.raises(UserError, match="allocator 'coverage' needs the coverage curves"):
        Space(("coverage", "sensitivity")).supported(bare)


def test_floor_and_mix_do_what_they_say():
    evidence = probed_evidence(6, 100, 0)
    budget = Budget(0.3, None, (PromptShape(2, 100, 6),), 4)
    uniform = Candidate().policy(evidence, budget).keep(6)
    assert max(uniform) - min(uniform) <= 0.01 + 1e-9
    for name in ALLOCATORS:
        assert Candidate(name, mix=0.0, temperature=3.0).policy(evidence, budget).keep(6) == uniform
        assert min(Candidate(name, floor=0.1).policy(evidence, budget).keep(6)) >= 0.1
    steep, flat = (Candidate("pyramid", temperature=t).policy(evidence, budget).keep(6) for t in (4.0, 0.25))
    assert steep[0] > flat[0] > flat[-1] > steep[-1]


def test_infeasible_budgets_name_what_is_enough():
    prompts, layers = (PromptShape(3, 20, 7), PromptShape(1, 10, 9)), 4
    for budget in (Budget(0.1, None, prompts, 8), Budget(0.1, 0.9, prompts, 8)):
        with pytest.raises(UserError, match=r"^budget 0\.1 is below 0\.4, what system and text alone need"):
            Space(text="all").within(budget, layers)
    with pytest.raises(UserError, match=r"^read budget 0\.3 is below 0\.4, what system, text"):
        Space(text="all").within(Budget(0.7, 0.3, prompts, 8), layers)
    # without 'never' the least is one refresh in 8 steps: 0.4 + (0.7 - 0.4) / 8
    with pytest.raises(UserError, match=r"^read budget 0\.42 is below 0\.438"):
        Space(refreshes=(1, 8), text="all").within(Budget(0.7, 0.42, prompts, 8), layers)
    assert Space(text="all").within(Budget(0.7, 0.42, prompts, 8), layers).refreshes == (0, 16, 32)
    assert Space(refreshes=(1, 8), text="all").within(Budget(0.7, 0.438, prompts, 8), layers).refreshes == (
        8,
    )


def test_starts_are_points_of_the_space():
    starts = Space().starts()
    assert starts[0] == Candidate()
    assert {start.allocator for start in starts} == set(Space().allocators)
    assert {start.scorer for start in starts} == set(Space().scorers)
    assert len(set(starts)) == len(starts)
    small = Space(("pyramid", "uniform"), ("value_norm",), ("kv_head",), (0, 16, 32))
    assert [(s.allocator, s.scorer, s.heads, s.refresh_interval) for s in small.starts()] == [
        ("uniform", "value_norm", "kv_head", 16),
        ("pyramid", "value_norm", "kv_head", 16),
    ]
    assert Space(refreshes=(0, 2, 4)).starts()[0].refresh_interval == 4
    static = [start for start in replace(Space(), reads=True).starts() if start.refresh_interval == 0]
    assert [start.scorer for start in static] == list(Space().scorers)
    assert len(replace(Space(), reads=True).starts()) == len(starts) + len(static)
    window = Space(text="trade").starts()
    assert {start.text_share for start in window} == {1.0, 0.25}


def test_warm_starts_are_brought_into_reach():
    """What another budget's winner holds may not be on offer here."""
    warm = (
        Candidate("pyramid", mix=0.3, scorer="value_norm", refresh_interval=3, text_share=0.5),
        Candidate("coverage"),
        Candidate("strength"),
    )
    space = replace(SPACE, refreshes=(0, 4, 16), scorers=("last_query", "instruction"), warm=warm)
    added = space.starts()[len(replace(space, warm=()).starts()) :]
    assert [(c.allocator, c.mix, c.scorer, c.refresh_interval, c.text_share) for c in added] == [
        ("pyramid", 0.3, "last_query", 4, None)
    ]
    assert space.described() == replace(space, warm=()).described()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"budget": 1.5}, r"budget must be in \[0, 1\].*got 1.5"),
        ({"budget": float("nan")}, "budget must be in"),
        ({"read_budget": -0.1}, r"read_budget must be in \[0, 1\].*got -0.1"),
        ({"trials": 0}, "trials must be 1 or more, got 0"),
        ({"samples": 1}, "samples must be 2 or more, got 1"),
        ({"proof_samples": 1}, "proof_samples must be 2 or more, got 1"),
        ({"finalists": 0}, "finalists must be 1 or more"),
        ({"objective": "kl"}, "unknown objective 'kl'; known: accuracy, fidelity, likelihood"),
        ({"sampler": "tpee"}, "unknown sampler 'tpee'; did you mean tpe"),
        ({"margin": 0.0}, "margin must be above 0 and below 1.*got 0.0"),
        ({"trials": 5, "refine": 5}, r"refine must be 0 or more and below trials \(5\), got 5"),
        ({"seed": -1}, "seed must be in"),
        ({"max_new_tokens": 1}, "max_new_tokens must be 2 or more, got 1; the first token"),
        ({"proof_split": "search"}, "split and proof_split must differ"),
    ],
)
def test_settings_refuse(values, said):
    with pytest.raises(UserError, match=said):
        Settings(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"allocators": ("unifrom",)}, "unknown allocator 'unifrom'; did you mean uniform"),
        ({"scorers": ("last_qery",)}, "unknown scorer 'last_qery'; did you mean last_query"),
        ({"heads": ("all",)}, "unknown kind of heads 'all'"),
        ({"refreshes": (-1,)}, "refreshes of the search space must be 0 or more, got -1"),
        ({"scorers": ()}, "scorers of the search space must name at least one"),
        ({"scorers": ("valued:instrction",)}, "unknown scorer 'instrction'; did you mean instruction"),
        ({"refresh": ("half",)}, "unknown kind of refresh 'half'"),
        ({"text": "none"}, "unknown text of the search space 'none'"),
    ],
)
def test_space_refuses(values, said):
    with pytest.raises(UserError, match=said):
        Space(**values)


# --- the sensitivity allocator ---


def best_sum(table, total):
    """Least sum of damages over all ways to give `total` units to the rows of a table, by enumeration."""
    ways = itertools.product(range(table.shape[1]), repeat=table.shape[0])
    return min(sum(row[k] for row, k in zip(table, way, strict=True)) for way in ways if sum(way) == total)


def units(table, total):
    """The allocator's units per row on a grid of the table's columns."""
    layers, levels = table.shape[0], np.linspace(0, 1, table.shape[1])
    evidence = replace(
        random_evidence(layers, 40, np.random.default_rng(0)), damage=table, damage_levels=levels
    )
    shares = Sensitivity().shares(evidence, total / (layers * (table.shape[1] - 1)))
    return shares * (table.shape[1] - 1)


@pytest.mark.parametrize("seed", range(12))
def test_sensitivity_is_the_optimum_of_a_convex_table(seed):
    rng = np.random.default_rng(seed)
    layers, steps = int(rng.integers(2, 5)), 5
    gains = -np.sort(-rng.exponential(size=(layers, steps)), axis=1)
    table = np.concatenate([gains[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((layers, 1))], axis=1)
    for total in range(layers * steps + 1):
        given = units(table, total)
        assert given.sum() == pytest.approx(total)
        np.testing.assert_allclose(given, given.round(), atol=1e-9)
        found = sum(table[row, round(k)] for row, k in enumerate(given))
        assert found == pytest.approx(best_sum(table, total))


@pytest.mark.parametrize("seed", range(6))
def test_sensitivity_takes_measured_noise(seed):
    """With rows that rise and bend the wrong way: between the optimum of their hulls and of uniform."""
    rng = np.random.default_rng(seed)
    table = rng.exponential(size=(3, 6))
    table[:, -1] = 0.0
    before = np.zeros(3)
    for total in range(16):
        given = units(table, total)
        assert given.sum() == pytest.approx(total)
        assert ((given >= before - 1e-9) & (given <= 5 + 1e-9)).all()
        before = given
    convex = np.array([hull(row) for row in table])
    for total in (3, 7, 12):
        ours = sum(np.interp(k, range(6), row) for row, k in zip(convex, units(table, total), strict=True))
        assert ours <= best_sum(convex, total) + 1e-9


def hull(row):
    """Greatest convex function below a row: the least over all chords, and never above what came before."""
    low = np.minimum.accumulate(row)
    return [
        min(
            low[a] if a == b else low[a] + (low[b] - low[a]) * (i - a) / (b - a)
            for a in range(i + 1)
            for b in range(i, len(row))
        )
        for i in range(len(row))
    ]


def test_sensitivity_without_damage_still_meets_the_target():
    for total in range(16):
        given = units(np.zeros((3, 6)), total)
        assert given.sum() == pytest.approx(total)
        assert given.max() <= 5


# --- trials, without a model ---


class Killed(BaseException):
    """Stops a trial as SIGKILL does: Optuna does not get to mark it."""


@dataclass
class FakeForced:
    """KL that is a plain function of policy and sample; stops at the wanted report."""

    samples: tuple[str, ...] = ("a", "b", "c", "d")
    error: BaseException | None = None
    at: int = -1
    asked: int = 0

    def parts(self, policy):
        weights = np.arange(1, len(policy.vision_keep) + 1)
        damage = float(weights @ (1 - np.array(policy.vision_keep)) ** 2) + len(policy.scorer.name) / 50
        for half in (self.samples[:2], self.samples[2:]):
            self.asked += 1
            if self.asked == self.at and self.error is not None:
                raise self.error
            yield [ForcedScore(name, damage * (1 + ord(name) % 3 / 9), 1.0, 0.0, 3) for name in half]

    def score(self, policy):
        return [score for part in self.parts(policy) for score in part]

    def score_many(self, policies):
        return [self.score(policy) for policy in policies]


def searched(folder, trials, forced=None, space=None, seed=0, on_trial=None, read=None):
    folder.mkdir(exist_ok=True)
    evidence = probed_evidence(3, 30, 5)
    budget = Budget(0.5, read, (PromptShape(1, 30, 5),), 6)
    space = (space or SPACE).within(budget, 3)
    objective = Objective(forced or FakeForced(), evidence, budget, space)
    return run_trials(folder, Settings(trials=trials, seed=seed), space, objective, on_trial=on_trial)


def outcome(study):
    """What the finished trials were and gave, in order."""
    return [
        (trial.params, trial.value, trial.user_attrs["policy"])
        for trial in study.get_trials(states=(TrialState.COMPLETE,))
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of 17 trials without a break."""
    return outcome(searched(tmp_path_factory.mktemp("whole"), 17))


def test_starts_come_first_and_once(whole):
    starts = [start.params(Budget(0.5, None, (), 1)) for start in SPACE.starts()]
    assert [params for params, *_ in whole[: len(starts)]] == starts
    assert all(params not in starts for params, *_ in whole[len(starts) :])


def test_seed_decides(tmp_path, whole):
    assert outcome(searched(tmp_path / "a", 17)) == whole
    other = outcome(searched(tmp_path / "b", 17, seed=1))
    assert other[:13] == whole[:13]
    assert other[13:] != whole[13:]


# asked counts halves of trials: 1 is the first trial's first half, 8 the fourth's second, 29 a sampled one
@pytest.mark.parametrize("at", [1, 8, 26, 27, 30, 34])
@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt(), UserError("out of memory")], ids=repr)
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path, whole, error, at, capfd):
    with pytest.raises(type(error)):
        searched(tmp_path, 17, FakeForced(error=error, at=at))
    left = read_study(tmp_path).get_trials(states=(TrialState.RUNNING,))
    assert len(left) == isinstance(error, Killed)
    study = searched(tmp_path, 17)
    assert outcome(study) == whole
    states = [trial.state for trial in study.get_trials()]
    assert states.count(TrialState.COMPLETE) == 17
    assert states.count(TrialState.FAIL) == 1
    assert len(states) == 18
    assert capfd.readouterr().err == ""


def test_more_trials_continue_and_fewer_do_nothing(tmp_path, whole):
    searched(tmp_path, 2)
    searched(tmp_path, 15)
    forced = FakeForced()
    assert outcome(searched(tmp_path, 4, forced)) == whole[:15]
    assert forced.asked == 0
    assert outcome(searched(tmp_path, 17)) == whole
    assert len(read_study(tmp_path).get_trials()) == 17


def test_a_torn_journal_and_a_stale_lock_are_mended(tmp_path, whole):
    searched(tmp_path, 5)
    journal = tmp_path / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","study_i')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)
    assert len(read_study(tmp_path).get_trials(states=(TrialState.COMPLETE,))) == 5
    assert outcome(searched(tmp_path, 17)) == whole


def test_progress_counts_finished_trials(tmp_path):
    told, seen = [], []
    evidence, budget = probed_evidence(3, 30, 5), Budget(0.5, None, (PromptShape(1, 30, 5),), 6)
    for trials in (2, 4):
        objective = Objective(FakeForced(), evidence, budget, SPACE)
        run_trials(
            tmp_path,
            Settings(trials=trials),
            SPACE,
            objective,
            progress=lambda *now: told.append(now),
            on_trial=lambda study, trial: seen.append(trial.number),
        )
    assert told == [(0, 2), (1, 2), (2, 2), (2, 4), (3, 4), (4, 4)]
    assert seen == [0, 1, 2, 3]


def test_reads_are_tuned_with_a_read_budget(tmp_path):
    study = searched(tmp_path, 16, read=0.35)
    for trial in study.get_trials():
        assert {"refresh_interval", "compute_temperature"} <= set(trial.params)
        assert trial.user_attrs["read_share"] <= 0.35
        assert trial.user_attrs["live_share"] <= 0.5


def test_a_small_space_is_searched_alone(tmp_path):
    space = Space(("pyramid",), ("value_norm",), ("shared",))
    study = searched(tmp_path, 4, space=space)
    assert {trial.params["allocator"] for trial in study.get_trials()} == {"pyramid"}
    assert len({trial.user_attrs["policy"] for trial in study.get_trials()}) == 4


def test_pruned_trials_are_never_finalists(tmp_path):
    class Pessimist(FakeForced):
        """From the third trial on, a first half so good that it would win, were the trial not stopped."""

        def parts(self, policy):
            for part in FakeForced.parts(self, policy):
                cut = self.asked > 4
                yield [replace(score, kl=score.kl / 100 if cut else score.kl) for score in part]

    class StopsAll(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number >= 2

    def first_three(study, trial):
        study.pruner = StopsAll()

    study = searched(tmp_path, 6, Pessimist(), on_trial=first_three)
    cut = [trial for trial in study.get_trials() if not trial.user_attrs["complete"]]
    assert [trial.number for trial in cut] == [2, 3, 4, 5]
    assert all(trial.state == TrialState.COMPLETE and trial.user_attrs["samples"] == 2 for trial in cut)
    assert [trial.number for trial in finalists(study, 9)] == sorted(
        (0, 1), key=lambda number: study.trials[number].value
    )
    assert min(cut, key=lambda trial: trial.value).value < finalists(study, 1)[0].value


def test_finalists_are_different_policies_best_first(tmp_path):
    study = searched(tmp_path, 17)
    best = finalists(study, 17)
    assert [t.value for t in best] == sorted(t.value for t in best)
    assert len({t.user_attrs["policy"] for t in best}) == len(best)
    assert {t.user_attrs["policy"] for t in best} == {t.user_attrs["policy"] for t in study.get_trials()}
    assert [t.number for t in finalists(study, 2)] == [t.number for t in best[:2]]


def test_a_score_that_is_no_number_stops_with_a_sentence(tmp_path):
    class Broken(FakeForced):
        def parts(self, policy):
            yield [ForcedScore(name, float("nan"), 1.0, 0.0, 3) for name in self.samples]

    with pytest.raises(UserError, match="trial 0 has no finite KL to dense"):
        searched(tmp_path, 3, Broken())


def test_the_probe_is_measured_once_and_whole(tmp_path):
    evidence = replace(probed_evidence(3, 30, 5), damage=None, damage_levels=None)
    path = tmp_path / "probe.json"
    with pytest.raises(Killed):
        probed(evidence, FakeForced(error=Killed(), at=11), path)
    assert list(tmp_path.iterdir()) == []
    told = []
    forced = FakeForced()
    found = probed(evidence, forced, path, lambda *now: told.append(now))
    assert forced.asked == 2 * 3 * (len(LEVELS) - 1)
    assert told[0] == (0, 12)
    assert told[-1] == (12, 12)
    for layer, column in itertools.product(range(3), range(len(LEVELS) - 1)):
        keep = tuple(LEVELS[column] if other == layer else 1.0 for other in range(3))
        scores = FakeForced().score(Policy(vision_keep=keep, scorer=ScorerSpec(name="instruction")))
        assert found.damage[layer, column] == pytest.approx(np.mean([score.kl for score in scores]))
    assert (found.damage[:, -1] == 0).all()
    again = probed(evidence, FakeForced(error=Killed(), at=1), path)
    np.testing.assert_array_equal(again.damage, found.damage)
    np.testing.assert_array_equal(again.damage_levels, LEVELS)
    with pytest.raises(UserError, match="is not of 4 layers"):
        probed(replace(evidence, layers=4), forced, path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"probe\.json cannot be read"):
        probed(evidence, forced, path)


@pytest.mark.parametrize("read", [None, 0.4])
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize(("scorer", "heads"), [("last_query", "shared"), ("instruction", "kv_head")])
def test_rivals_have_equal_bytes_and_differ(allocator, scorer, heads, read):
    budget = Budget(0.5, read, (PromptShape(1, 30, 5), PromptShape(2, 21, 4)), 6)
    start = Candidate(allocator, scorer=scorer, heads=heads, refresh_interval=4)
    winner = start.policy(probed_evidence(4, 30, 2), budget)
    others = {policy.name: policy for policy in rivals(winner, budget, 4)}
    assert others["random"].scorer.name == "random"
    # a uniform winner is its own baseline, unless it ranks in another way than A-VL
    plain = scorer == "last_query"
    assert ("uniform" in others) == (allocator != "uniform" or not plain)
    assert ("uniform, same scorer" in others) == (allocator != "uniform" and not plain)
    hashes = {policy.hash for policy in (winner, *others.values())}
    assert len(hashes) == 1 + len(others)
    for name, policy in others.items():
        assert live_share(policy, budget.prompts, 4) <= live_share(winner, budget.prompts, 4)
        if name == "uniform":
            assert (policy.scorer.name, policy.heads) == ("last_query", "shared")
        if name == "uniform, same scorer":
            assert (policy.scorer.name, policy.heads) == (scorer, heads)


def test_a_flat_winner_with_another_scorer_still_meets_plain_uniform():
    budget = Budget(0.5, None, (PromptShape(1, 30, 5),), 6)
    winner = Policy(name="tuned", vision_keep=(0.4,) * 4, scorer=ScorerSpec(name="instruction"))
    others = {policy.name: policy for policy in rivals(winner, budget, 4)}
    assert set(others) == {"uniform", "random"}
    assert others["uniform"].scorer.name == "last_query"
    assert others["uniform"].keep(4) == winner.keep(4)


# --- the whole of it, on the embedded model ---


class Study(NamedTuple):
    run: Run
    folder: Path
    tuned: avlprof.Tuned
    phases: list[str]


def options(study_or_run, out):
    """Arguments of the study under test."""
    return {
        "budget": BUDGET,
        "read_budget": READ,
        "trials": 15,
        "refine": 0,
        "samples": SAMPLES,
        "proof_samples": 4,
        "max_new_tokens": LIMIT,
        "run": study_or_run,
        "out": out,
    }


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("tuning")
    run = avlprof.trace(tiny, TASK, 3, out=root / "run", max_new_tokens=LIMIT)
    phases = []
    tuned = tune_verb(
        tiny,
        TASK,
        **options(run, root / "study"),
        progress=lambda phase, done, total: phases.append(phase) if done == total else None,
    )
    return Study(run, root / "study", tuned, phases)


@pytest.fixture(scope="module")
def forced(tiny):
    return ForcedSet.prepare(tiny, load_task(TASK).samples("search", SAMPLES), max_new_tokens=LIMIT)


def test_values_are_the_mean_kl_of_the_noted_policy(study, forced):
    trials = study.tuned.study.get_trials()
    assert len(trials) == 15
    assert [trial.params["allocator"] for trial in trials[:8]] == list(Space().allocators)
    for trial in trials:
        policy = parse_policy(trial.user_attrs["policy"])
        wanted = np.mean([score.kl for score in forced.score(policy)])
        assert trial.user_attrs["complete"]
        assert trial.value == pytest.approx(wanted, abs=1e-5)
        assert trial.intermediate_values.keys() == set(range(SAMPLES))
        assert trial.user_attrs["live_share"] == live_share(policy, forced.shapes, 6) <= BUDGET
        steps = max(round(forced.answer_tokens), 1)
        assert trial.user_attrs["read_share"] == read_share(policy, forced.shapes, 6, steps) <= READ
    assert study.phases == ["dense answers", "probe", "trials", "finalists", "proof", "knobs"]


def test_the_metric_decides_among_the_finalists(study, tiny):
    best = finalists(study.tuned.study, 3)
    task = load_task(TASK)
    samples = task.samples("search", SAMPLES)
    scores = []
    for trial in best:
        policy = parse_policy(trial.user_attrs["policy"])
        answers = generate_answers(
            tiny, samples, policy, max_new_tokens=LIMIT, batch_size=32, metric=task.metric
        )
        scores.append(np.mean([answer.score for answer in answers]))
    assert study.tuned.policy.provenance.trial == best[int(np.argmax(scores))].number


def test_the_winner_is_proved_on_held_out_samples(study):
    proof, winner = study.tuned.proof, study.tuned.policy
    held_out = {sample.id for sample in load_task(TASK).samples("held-out", 4)}
    assert set(proof.answers["sample"]) == held_out
    assert {"dense", "tuned", "random x3"} <= set(proof.answers["policy"])
    note = winner.provenance
    assert (note.model, note.task, note.samples, note.seed) == ("tiny", TASK, SAMPLES, 0)
    assert (note.budget, note.read_budget) == (BUDGET, READ)
    assert note.model_hash == load_policy(study.folder / "policy.yaml").provenance.model_hash != ""
    assert note.run_hash == study.run.directory.hash
    assert 0 < note.policy_bytes <= BUDGET * note.dense_bytes * 1.05
    assert set(note.scores) == set(proof.answers["policy"])
    for row in proof.summary().to_dict("records"):
        score = note.scores[row["policy"]]
        assert score.low <= score.mean <= score.high
        assert (score.mean, score.samples) == (pytest.approx(row["score"], abs=1e-6), 4)
    lines = study.tuned.comparisons()
    assert len(lines) == len(note.scores)
    assert all(line.startswith("tuned - ") for line in lines[:-1])
    assert lines[-1].startswith(f"not inferior to {note.proof.strongest}")


def test_the_same_seed_in_a_fresh_folder_finds_the_same(study, tiny, tmp_path):
    again = tune_verb(tiny, TASK, **options(study.run, tmp_path / "again") | {"trials": 3})
    first = outcome(study.tuned.study)[:3]
    assert outcome(again.study) == first
    more = tune_verb(tiny, TASK, **options(study.run, tmp_path / "again"))
    assert outcome(more.study) == outcome(study.tuned.study)
    assert more.policy.hash == study.tuned.policy.hash
    assert len(more.study.get_trials()) == 15


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0.5}, "holds another study (budget: 0.4 here, 0.5 asked)"),
        ({"read_budget": None}, "read_budget: 0.35 here, None asked"),
        ({"task": "shapes:row"}, "task: 'shapes:read' here, 'shapes:row' asked"),
        ({"samples": 5}, "samples: 6 here, 5 asked"),
        ({"seed": 7}, "seed: 0 here, 7 asked"),
        ({"space": Space(("uniform",))}, "space: {"),
        ({"objective": "accuracy"}, "objective: 'fidelity' here, 'accuracy' asked"),
        ({"sampler": "random"}, "sampler: 'tpe' here, 'random' asked"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_study_in_the_folder_is_refused(study, tiny, changes, said):
    before = (study.folder / "study.json").read_text()
    arguments = {"task": TASK} | options(study.run, study.folder) | changes
    with pytest.raises(UserError) as refusal:
        tune_verb(tiny, **arguments)
    assert said in str(refusal.value)
    assert str(study.folder) in str(refusal.value)
    assert (study.folder / "study.json").read_text() == before


def test_another_model_is_refused(study, tiny, tmp_path):
    other = replace(tiny, revision="0123")
    with pytest.raises(UserError, match=r"was traced on tiny .*, the model here is tiny 0123"):
        tune_verb(other, TASK, **options(study.run, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_what_is_no_study_is_left_alone(study, tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not a study"):
        tune_verb(tiny, TASK, **options(study.run, tmp_path))
    with pytest.raises(UserError, match="is not empty and not a study"):
        tune_verb(tiny, TASK, **options(study.run, tmp_path / "thesis.tex"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_infeasible_budget_makes_no_folder(study, tiny, tmp_path):
    with pytest.raises(UserError, match=r"^budget 0\.01 is below 0\.\d+, what system and text alone need"):
        tune_verb(tiny, TASK, **options(study.run, tmp_path / "new") | {"budget": 0.01})
    with pytest.raises(UserError, match=r"^read budget 0\.01 is below 0\.\d+"):
        tune_verb(tiny, TASK, **options(study.run, tmp_path / "new") | {"read_budget": 0.01})
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_worked_on_is_left_alone(study, tiny):
    lock = FolderLock(study.folder)
    try:
        with pytest.raises(UserError, match="another process is writing to"):
            tune_verb(tiny, TASK, **options(study.run, study.folder))
    finally:
        lock.release()


def test_study_names():
    settings = Settings(budget=0.25, read_budget=0.2, seed=3)
    model, task = SimpleNamespace(name="org/some model"), SimpleNamespace(name="a:b,c")
    assert study_name(model, task, settings) == "some-model-a-b-c-b0.25-r0.2-s3"
    assert study_name(SimpleNamespace(name="tiny"), load_task("shapes"), Settings()) == "tiny-shapes-b0.2"


# --- the command line ---


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="avlprof")


def refused(*arguments):
    """The sentence on stderr of a command that leaves with exit code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr.rstrip().splitlines()[-1].removeprefix("error: ")


def command(study, out, *more):
    arguments = ["tune", "--task", TASK, "--budget", BUDGET, "--read-budget", READ, "--trials", 15]
    arguments += ["--refine", 0]
    arguments += ["-n", SAMPLES, "--proof-samples", 4, "--max-new-tokens", LIMIT, "--run", study.run.path]
    return [str(argument) for argument in (*arguments, "--device", "cpu", "--out", out, *more)]


KILLS_ITSELF = """
import os, signal, sys
import optuna
report, calls, last = optuna.Trial.report, [], int(sys.argv[1])

def report_or_die(trial, value, step):
    report(trial, value, step)
    calls.append(step)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)

optuna.Trial.report = report_or_die
sys.argv[:2] = ["avlprof"]
from avlprof.cli import main
main()
"""


def test_kill_9_in_a_trial_loses_and_repeats_none(study, tmp_path):
    """The process dies with two samples of its fourth trial reported; then the same command."""
    folder = tmp_path / "killed"
    arguments = command(study, folder, "--format", "json")
    died = subprocess.run(
        [sys.executable, "-c", KILLS_ITSELF, str(3 * SAMPLES + 2), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    states = [trial.state.name for trial in read_study(folder).get_trials()]
    assert states == ["COMPLETE"] * 3 + ["RUNNING"]
    assert "no trial" not in died.stderr
    assert "Warning" not in died.stderr
    assert not list(folder.glob(".*.partial"))
    assert export_policy(folder).provenance.scores == {}

    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.stderr
    trials = read_study(folder).get_trials()
    assert [trial.state.name for trial in trials].count("COMPLETE") == 15
    assert [trial.number for trial in trials if trial.state != TrialState.COMPLETE] == [3]
    assert trials[3].state == TrialState.FAIL
    assert trials[4].params == study.tuned.study.trials[3].params
    assert outcome(read_study(folder)) == outcome(study.tuned.study)
    assert load_policy(folder / "policy.yaml").hash == study.tuned.policy.hash

    rows = json.loads(result.stdout)
    assert [row["policy"] for row in rows][:2] == ["dense", "tuned"]
    assert f"wrote {folder / 'policy.yaml'}" in result.stderr
    assert {path.name for path in (folder / "figures").iterdir()} == {
        *("trials.png", "layers.png", "proof.png", "knobs.png")
    }
    last = result.stderr.rstrip().splitlines()[-1]
    assert last == f"next: avlprof evaluate --policy {folder / 'policy.yaml'} --task {TASK}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", 0], "trials must be 1 or more, got 0"),
        (["--budget", 1.2], "budget must be in [0, 1]"),
        (["--samples", 1], "samples must be 2 or more, got 1"),
        (["--task", "shpes"], "unknown task 'shpes'; did you mean shapes?"),
        (["--run", "no/such/run"], "no/such/run"),
        (["--model", "tinny"], "unknown model 'tinny'; did you mean tiny?"),
    ],
)
def test_tune_refuses(arguments, said, tmp_path):
    assert said in refused("tune", *arguments, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tune_refuses_a_folder_of_another_study(study):
    said = refused(*command(study, study.folder, "--seed", 9))
    assert said == f"{study.folder} holds another study (seed: 0 here, 9 asked); choose another --out"


# --- export ---


def test_export_gives_the_proved_winner(study, tmp_path):
    result = invoke("export", study.folder, "-o", tmp_path / "winner.yaml")
    assert result.exit_code == 0, result.output
    assert result.stderr.rstrip().endswith(f"next: avlprof policy show {tmp_path / 'winner.yaml'}")
    text = (tmp_path / "winner.yaml").read_text()
    assert text == (study.folder / "policy.yaml").read_text()
    assert dump_policy(load_policy(tmp_path / "winner.yaml")) == text
    assert invoke("export", study.folder).stdout == text
    assert load_policy(tmp_path / "winner.yaml") == study.tuned.policy


def test_export_gives_any_trial_with_its_origin(study):
    for trial in (0, 2, 14):
        text = invoke("export", study.folder, "--trial", trial).stdout
        assert text == invoke("export", study.folder, "--trial", trial).stdout
        policy = parse_policy(text)
        assert dump_policy(policy) == text
        done = study.tuned.study.trials[trial]
        assert policy.hash == parse_policy(done.user_attrs["policy"]).hash
        note = policy.provenance
        assert (note.study, note.trial, note.model, note.task) == ("study", trial, "tiny", TASK)
        assert (note.samples, note.seed, note.budget, note.read_budget) == (SAMPLES, 0, BUDGET, READ)
        assert note.measured_budget <= BUDGET
        assert f"{done.value:.4f}" in note.notes
        assert "not proved" in note.notes


def test_export_gives_a_point_of_the_front(study):
    trials = study.tuned.study.get_trials()
    for limit in sorted({trial.user_attrs["read_share"] for trial in trials}):
        policy = export_policy(study.folder, max_read=limit)
        wanted = min(
            (t for t in trials if t.user_attrs["read_share"] <= limit), key=lambda t: (t.value, t.number)
        )
        assert policy.provenance.trial == wanted.number


def test_export_refuses(study, tmp_path):
    assert "has no finished trial 99; the 15 finished ones are below 15" in refused(
        "export", study.folder, "--trial", 99
    )
    assert "not both" in refused("export", study.folder, "--trial", 1, "--max-read", 0.3)
    assert "max_read must be in [0, 1]" in refused("export", study.folder, "--max-read", 2)
    said = refused("export", study.folder, "--max-read", 0.01)
    enough = float(said.rsplit(" ", 1)[1])
    assert export_policy(study.folder, max_read=enough).provenance.trial is not None
    assert "is not a study" in refused("export", tmp_path)
    assert "is not a study" in refused("export", tmp_path / "none")
    (tmp_path / "study.json").write_text((study.folder / "study.json").read_text())
    assert "has no trial yet" in refused("export", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
    (tmp_path / "study.json").write_text("{}")
    assert "study.json cannot be read" in refused("export", tmp_path)
    assert read_meta(study.folder).model == "tiny"
