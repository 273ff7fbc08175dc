"""Batches of trials that are halved: who survives, against plain loops; resume, deaths and workers."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
from optuna.trial import TrialState

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.policy import PromptShape, parse_policy
from avlprof.runtime.forced import ForcedScore
from avlprof.tuning import Budget, Settings, Space, read_study
from avlprof.tuning.objective import Objective, better_half, rungs
from avlprof.tuning.refine import refine
from avlprof.tuning.storages._base import BATCH, give_up
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.study import StudyMeta, finalists
from avlprof.tuning.trials import run_trials
from avlprof.tuning.workers import _settings
from tests.helpers import few
from tests.search_space import outcome
from tests.watching import Notes

LAYERS = 3
BUDGET = Budget(0.5, None, (PromptShape(1, 30, 5),), 6)
EVIDENCE = Evidence(layers=LAYERS, tokens=30)
SPACE = Space(("uniform", "pyramid", "sigmoid"), ("last_query", "instruction"), ("shared",), bits=(16,))
SPACE = replace(SPACE, text_bits=(16,)).within(BUDGET, LAYERS)


class Killed(BaseException):
    """Stops a worker as SIGKILL does: nothing is marked."""


@dataclass
class Noisy:
    """A number for each policy and sample that no order of policies follows from; in batches of `size`."""

    count: int = 13
    size: int = 4
    error: BaseException | None = None
    at: int = -1
    asked: int = 0
    policies: int = 0

    @property
    def samples(self):
        return [f"s{index}" for index in range(self.count)]

    def value(self, policy, index):
        level = float(np.dot(np.arange(1, LAYERS + 1), 1 - np.array(policy.keep(LAYERS))))
        return level + abs(np.sin(int(policy.hash[:6], 16) % 997 * (index + 1)))

    def batches(self):
        for start in range(0, self.count, self.size):

            def score(policies, start=start):
                self.asked += 1
                self.policies += len(policies)
                if self.asked == self.at and self.error is not None:
                    raise self.error
                rows = range(start, min(start + self.size, self.count))
                return [[ForcedScore(f"s{i}", self.value(p, i), 1.0, 0.0, 3) for i in rows] for p in policies]

            yield score


def searched(folder, trials=21, scores=None, halving=6, watch=None, **changed):
    folder.mkdir(exist_ok=True)
    objective = Objective(scores or Noisy(), EVIDENCE, BUDGET, SPACE)
    settings = Settings(trials=trials, refine=0, halving=halving, **changed)
    return run_trials(FolderStorage(folder), settings, objective, watch=watch or Notes())


def done(study):
    return study.get_trials(states=(TrialState.COMPLETE,))


def batches(study):
    found = defaultdict(list)
    for trial in done(study):
        found[trial.user_attrs[BATCH]].append(trial)
    return list(found.values())


def seen_by_brute_force(values):
    """How many of the samples each row of `[trials, samples]` is scored on: by counting who is better."""
    count, samples = values.shape
    alive, seen = set(range(count)), [samples] * count
    for end in sorted({int(np.ceil(samples / 4)), int(np.ceil(samples / 2))}):
        means = {row: sum(values[row, :end]) / end for row in alive}
        room = int(np.ceil(len(alive) / 2))
        for row in sorted(alive):
            better = sum((means[o], o) < (means[row], row) for o in means)
            if better >= room:
                alive.discard(row)
                seen[row] = end
    return seen


def whole_values(study_trials, scores):
    policies = [parse_policy(trial.user_attrs["policy"]) for trial in study_trials]
    return np.array([[scores.value(p, i) for i in range(scores.count)] for p in policies])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of 21 trials in batches of six without a break."""
    return searched(tmp_path_factory.mktemp("whole"))


def test_rungs_are_a_quarter_and_a_half():
    assert [rungs(count) for count in (1, 2, 3, 4, 5, 64)] == [(), (1,), (1, 2), (1, 2), (2, 3), (16, 32)]


@pytest.mark.parametrize("seed", range(6))
def test_the_better_half_is_no_worse_than_the_rest(seed):
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(40)[: rng.integers(1, 12)].tolist()
    means = {number: float(rng.integers(0, 4)) / 3 for number in numbers}
    if seed % 2:
        means[99] = float("nan")
    stay = better_half(means)
    assert len(stay) == (len(means) + 1) // 2
    for inside, outside in itertools.product(stay, set(means) - stay):
        assert np.isnan(means[outside]) or (means[inside], inside) < (means[outside], outside)


@pytest.mark.parametrize("sizes", few(["13 4", "13 13", "5 1", "2 2", "1 1"], ["13 4"]))
def test_who_survives_is_what_brute_force_says(tmp_path, sizes):
    count, size = map(int, sizes.split())
    scores = Noisy(count, size)
    study = searched(tmp_path, 15, scores)
    assert [len(batch) for batch in batches(study)] == [6, 6, 3]
    for batch in batches(study):
        values = whole_values(batch, scores)
        assert [trial.user_attrs["samples"] for trial in batch] == seen_by_brute_force(values)
        for trial, row in zip(batch, values, strict=True):
            seen = trial.user_attrs["samples"]
            assert trial.user_attrs["complete"] == (seen == count)
            assert trial.value == pytest.approx(row[:seen].mean())
            assert trial.intermediate_values == {i: pytest.approx(row[i]) for i in range(seen)}
    best = finalists(study, 99)
    assert all(trial.user_attrs["complete"] for trial in best)


def test_batches_of_samples_decide_nothing(tmp_path, whole):
    assert outcome(searched(tmp_path, scores=Noisy(size=13))) == outcome(whole)


def test_trials_of_a_batch_share_passes(tmp_path):
    scores = Noisy(16, 4)
    searched(tmp_path, 6, scores)
    assert (scores.asked, scores.policies) == (4, 6 + 3 + 2 + 2)
    every = Noisy(16, 4)
    study = searched(tmp_path / "all", 6, every, prune=False)
    assert (every.asked, every.policies) == (4, 24)
    assert all(trial.user_attrs["complete"] for trial in done(study))


def test_starts_come_first_and_the_sampler_knows_no_score_of_the_batch(tmp_path, whole):
    """Those of one batch are the same whatever the others of it score."""
    starts = [start.params(BUDGET) for start in SPACE.starts()]
    trials = sorted(done(whole), key=lambda trial: trial.number)
    assert [trial.params for trial in trials[: len(starts)]] == starts
    assert len({tuple(trial.params.items()) for trial in trials}) == len(trials)

    class Other(Noisy):
        def value(self, policy, index):
            return Noisy.value(self, policy, index) * (-1 if self.asked > 8 else 1)

    other = sorted(done(searched(tmp_path, scores=Other())), key=lambda trial: trial.number)
    assert [t.params for t in other[:18]] == [t.params for t in trials[:18]]
    assert [t.value for t in other[12:18]] != [t.value for t in trials[12:18]]


# a batch asks four times: 1 is the first pass of the first one, 4 its last, 11 the third pass of the third
@pytest.mark.parametrize("at", few([1, 3, 11], [11]))
@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt(), UserError("out of memory")], ids=repr)
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path, whole, error, at):
    with pytest.raises(type(error)):
        searched(tmp_path, scores=Noisy(error=error, at=at))
    left = read_study(tmp_path).get_trials(states=(TrialState.RUNNING,))
    assert bool(left) == isinstance(error, Killed)
    study = searched(tmp_path)
    same(study, whole)


@pytest.mark.parametrize("after", few([2, 4, 9], [4]))
def test_a_death_between_two_results_of_a_batch_changes_nothing(tmp_path, whole, after):
    class Dies(Notes):
        def trial(self, study, trial):
            Notes.trial(self, study, trial)
            if len(self.trials) == after:
                raise Killed

    with pytest.raises(Killed):
        searched(tmp_path, watch=Dies())
    assert len(done(read_study(tmp_path))) == after
    same(searched(tmp_path), whole)


@pytest.mark.parametrize("asked", few([3, 14], [14]))
def test_a_death_while_a_batch_is_taken_changes_nothing(tmp_path, whole, asked, monkeypatch):
    begin, calls = FolderStorage.begin, itertools.count(1)

    def dies(self, trial, worker):
        if next(calls) == asked + 1:
            raise Killed
        begin(self, trial, worker)

    with monkeypatch.context() as patched:
        patched.setattr(FolderStorage, "begin", dies)
        with pytest.raises(Killed):
            searched(tmp_path)
    same(searched(tmp_path), whole)


def same(study, whole):
    """The same trials in the same batches with the same values; lost ones are marked as such."""

    def told(one):
        return sorted(
            (t.user_attrs["policy"], t.value, t.user_attrs["samples"], str(sorted(t.params.items())))
            for t in done(one)
        )

    assert told(study) == told(whole)
    assert [len(b) for b in batches(study)] == [len(b) for b in batches(whole)]
    states = [trial.state for trial in study.get_trials()]
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    assert states.count(TrialState.COMPLETE) == 21


def test_several_workers_run_no_trial_too_many_and_halve_their_own(tmp_path):
    errors = []

    def run():
        try:
            searched(tmp_path, 27, halving=4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    study = read_study(tmp_path)
    assert len(study.get_trials()) == len(done(study)) == 27
    assert sorted(len(batch) for batch in batches(study)) == [3, 4, 4, 4, 4, 4, 4]
    for batch in batches(study):
        assert len({trial.user_attrs["worker"] for trial in batch}) == 1
        assert [t.user_attrs["samples"] for t in batch] == seen_by_brute_force(whole_values(batch, Noisy()))


def test_who_was_taken_for_dead_gives_its_batch_to_others(tmp_path):
    """Another worker queues one of its trials again; what is scored of it does not count."""
    other, taken = FolderStorage(tmp_path).open(), []

    class Late(Noisy):
        def value(self, policy, index):
            if self.asked == 2 and not taken:
                taken.append(2)
                give_up(other, other.trials[2])
            return Noisy.value(self, policy, index)

    study = searched(tmp_path, 9, Late())
    assert study.trials[2].state == TrialState.FAIL
    assert study.trials[2].value is None
    assert len(done(study)) == 9
    assert [len(batch) for batch in batches(study)] == [6, 3]
    for batch in batches(study):
        ordered = sorted(batch, key=lambda t: t.system_attrs.get("retry_history", [t.number])[0])
        values = whole_values(ordered, Noisy())
        assert [t.user_attrs["samples"] for t in ordered] == seen_by_brute_force(values)


def test_a_batch_is_told_as_a_whole_in_the_order_of_its_trials(tmp_path):
    notes, passes = Notes(), []

    class Passes(Noisy):
        def batches(self):
            for score in Noisy.batches(self):
                passes.append(len(notes.trials))
                yield score

    searched(tmp_path, 6, Passes(16, 4), watch=notes)
    assert notes.trials == list(range(6))
    assert notes.counts("trials") == [(count, 6) for count in range(7)]
    assert passes == [0, 0, 0, 0]


def test_a_trial_without_a_finite_score_stops_the_study_with_a_sentence(tmp_path):
    class Broken(Noisy):
        def value(self, policy, index):
            return float("nan") if "instruction" in str(policy.scorer) else 1.0

    with pytest.raises(UserError, match=r"trial \d has no finite KL to dense"):
        searched(tmp_path, scores=Broken())
    assert read_study(tmp_path).get_trials(states=(TrialState.RUNNING,)) == []


def test_layers_are_refined_in_batches_too(tmp_path):
    objective = Objective(Noisy(8, 2), EVIDENCE, BUDGET, SPACE)
    first = searched(tmp_path, 6, Noisy(8, 2))
    settings = Settings(trials=12, refine=7, halving=4)
    study = refine(tmp_path, settings, objective, finalists(first, 1)[0])
    assert [len(batch) for batch in batches(study)] == [4, 3]
    assert all(name.startswith("keep_") for trial in done(study) for name in trial.params)


def test_one_trial_must_be_taken_at_least():
    with pytest.raises(UserError, match="halving must be 1 or more, got 0"):
        Settings(halving=0)
    assert not Settings(halving=8, prune=False).halves


def test_a_study_goes_on_in_the_batches_that_it_was_begun_with():
    about = StudyMeta(
        model="tiny", model_hash="a", task="shapes", split="search", samples=4, sample_hash="b",
        max_new_tokens=6, dtype="float32", budget=0.2, read_budget=None, seed=0, run_hash="c",
        space=SPACE.described(), halving=8,
    )  # fmt: skip
    before = {name: value for name, value in about.model_dump().items() if name != "halving"}
    old = StudyMeta.model_validate(before)
    assert (old.halving, _settings(old, 9, True).halves) == (1, False)
    assert about.differences(old) == ["halving: 8 here, 1 asked"]
    joined = _settings(about, 9, True)
    assert (joined.halving, joined.halves) == (8, True)
