"""Trials without a model: order, seeds, interruption against none, finalists and rivals."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from avlprof.errors import UserError
from avlprof.policy import (
    RANKING,
    Policy,
    PromptShape,
    ScorerSpec,
    live_share,
    load_policy,
    shipped,
)
from avlprof.runtime.forced import ForcedScore
from avlprof.tuning import Budget, Candidate, Settings, Space, read_study
from avlprof.tuning.evidence import LEVELS, SCORER, probed
from avlprof.tuning.objective import Objective
from avlprof.tuning.rivals import rivals
from avlprof.tuning.storages.journal import JOURNAL, FolderStorage
from avlprof.tuning.study import finalists
from avlprof.tuning.trials import run_trials
from avlprof.watch import SILENT, Watch
from tests.helpers import few
from tests.search_space import ALLOCATORS, SPACE, ByParts, outcome, probed_evidence
from tests.watching import Notes


class Killed(BaseException):
    """Stops a trial as SIGKILL does: Optuna does not get to mark it."""


@dataclass
class FakeForced(ByParts):
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


PLAIN = replace(SPACE, bits=(16,), text_bits=(16,))  # thirteen starts


def searched(folder, trials, forced=None, space=None, seed=0, watch=SILENT, read=None):
    folder.mkdir(exist_ok=True)
    evidence = probed_evidence(3, 30, 5)
    budget = Budget(0.5, read, (PromptShape(1, 30, 5),), 6)
    space = (space or PLAIN).within(budget, 3)
    objective = Objective(forced or FakeForced(), evidence, budget, space)
    return run_trials(FolderStorage(folder), Settings(trials=trials, seed=seed), objective, watch=watch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of 17 trials without a break."""
    return outcome(searched(tmp_path_factory.mktemp("whole"), 17))


def test_starts_come_first_and_once(whole):
    starts = [start.params(Budget(0.5, None, (), 1)) for start in PLAIN.starts()]
    assert [params for params, *_ in whole[: len(starts)]] == starts
    assert all(params not in starts for params, *_ in whole[len(starts) :])


def test_seed_decides(tmp_path, whole):
    assert outcome(searched(tmp_path / "a", 17)) == whole
    other = outcome(searched(tmp_path / "b", 17, seed=1))
    assert other[:13] == whole[:13]
    assert other[13:] != whole[13:]


# asked counts halves of trials: 1 is the first trial's first half, 8 the fourth's second, 29 a sampled one
@pytest.mark.parametrize("at", few([1, 8, 26, 27, 30, 34], [8]))
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
    notes = Notes()
    evidence, budget = probed_evidence(3, 30, 5), Budget(0.5, None, (PromptShape(1, 30, 5),), 6)
    for trials in (2, 4):
        objective = Objective(FakeForced(), evidence, budget, PLAIN)
        run_trials(FolderStorage(tmp_path), Settings(trials=trials), objective, watch=notes)
    assert notes.phases == [("trials", *now) for now in ((0, 2), (1, 2), (2, 2), (2, 4), (3, 4), (4, 4))]
    assert notes.trials == [0, 1, 2, 3]


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

    class FirstThree(Watch):
        def trial(self, study, trial):
            study.pruner = StopsAll()

    study = searched(tmp_path, 6, Pessimist(), watch=FirstThree())
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
    notes = Notes()
    forced = FakeForced()
    found = probed(evidence, forced, path, notes)
    assert forced.asked == 2 * 3 * (len(LEVELS) - 1)
    assert notes.phases[0] == ("probe", 0, 12)
    assert notes.phases[-1] == ("probe", 12, 12)
    for layer, column in itertools.product(range(3), range(len(LEVELS) - 1)):
        keep = tuple(LEVELS[column] if other == layer else 1.0 for other in range(3))
        scores = FakeForced().score(Policy(vision_keep=keep, scorer=ScorerSpec.of(SCORER)))
        assert found.damage[layer, column] == pytest.approx(np.mean([score.kl for score in scores]))
    assert (found.damage[:, -1] == 0).all()
    again = probed(evidence, FakeForced(error=Killed(), at=1), path)
    np.testing.assert_array_equal(again.damage, found.damage)
    np.testing.assert_array_equal(again.damage_levels, LEVELS)
    with pytest.raises(UserError, match="is not of 4 layers"):
        probed(replace(evidence, layers=4), forced, path)
    for text in ("[]", "{", json.dumps({"scorer": SCORER})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"probe\.json cannot be read"):
            probed(evidence, forced, path)
    old = {"levels": list(LEVELS), "damage": np.ones((3, len(LEVELS))).tolist()}  # by another ranking
    path.write_text(json.dumps(old))
    np.testing.assert_array_equal(probed(evidence, FakeForced(), path).damage, found.damage)


@pytest.mark.parametrize("read", [None, 0.4])
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize(("scorer", "heads"), [("last_query", "shared"), ("instruction", "kv_head")])
def test_rivals_have_equal_bytes_and_differ(allocator, scorer, heads, read):
    budget = Budget(0.5, read, (PromptShape(1, 30, 5), PromptShape(2, 21, 4)), 6)
    start = Candidate(allocator, scorer=scorer, heads=heads, refresh_interval=4)
    winner = start.policy(probed_evidence(4, 30, 2), budget)
    others = {policy.name: policy for policy in rivals(winner, budget, 4)}
    assert others["random"].scorer.name == "random"
    # a uniform winner is its own baseline, unless it ranks in another way than that does
    flat = allocator == "uniform"
    assert "uniform" in others
    assert ("uniform, same scorer" in others) == (not flat)
    assert ("uniform, last_query" in others) == (scorer != "last_query")
    hashes = {policy.hash for policy in (winner, *others.values())}
    assert len(hashes) == 1 + len(others)
    for name, policy in others.items():
        assert live_share(policy, budget.prompts, 4) <= live_share(winner, budget.prompts, 4)
        if name == "uniform":
            assert (policy.scorer, policy.heads) == (ScorerSpec.of(RANKING), "shared")
        if name == "uniform, last_query":
            assert (policy.scorer.name, policy.heads) == ("last_query", "shared")
        if name == "uniform, same scorer":
            assert (policy.scorer.name, policy.heads) == (scorer, heads)


def test_a_flat_winner_with_another_scorer_still_meets_plain_uniform():
    budget = Budget(0.5, None, (PromptShape(1, 30, 5),), 6)
    winner = Policy(name="tuned", vision_keep=(0.4,) * 4, scorer=ScorerSpec(name="accumulated"))
    others = {policy.name: policy for policy in rivals(winner, budget, 4)}
    assert set(others) == {"uniform", "uniform, last_query", "random"}
    assert others["uniform"].scorer == load_policy(shipped()["uniform"]).scorer == ScorerSpec.of(RANKING)
    assert others["uniform"].keep(4) == winner.keep(4)
    plain = winner.model_copy(update={"scorer": ScorerSpec.of(RANKING)})
    assert {policy.name for policy in rivals(plain, budget, 4)} == {"uniform, last_query", "random"}
