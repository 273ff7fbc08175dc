"""The tune bench: what it judges and counts; what it times is not judged here."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from avlprof.allocators import Evidence
from avlprof.bench import side_by_side, tune
from avlprof.bench.side_by_side import run_side_by_side, together
from avlprof.bench.tune import SINGLE, TrialCost, TuneBench, run_tune_bench, trial_policies
from avlprof.errors import UserError
from avlprof.models import ModelSpec
from avlprof.policy import BITS, RANKING, PromptShape, live_share
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_task
from avlprof.tasks.spec import TaskSpec
from avlprof.tuning import Space
from avlprof.tuning.candidate import scorer_spec
from tests.watching import Notes


@pytest.fixture(scope="module")
def bench(tiny):
    """The rows, and per call of a way the policies that it judged."""
    judged: dict[str, list[list[str]]] = {"alone": [], "together": [], "batches": [], SINGLE: []}
    notes = Notes()
    patch = pytest.MonkeyPatch()
    score, many, generate = ForcedSet.score, ForcedSet.score_many, tune._generate

    def note_one(self, policy):
        judged["alone"].append([policy.name])
        return score(self, policy)

    def note_many(self, policies):
        if len(policies) > 1:
            judged["together"].append([policy.name for policy in policies])
        return many(self, policies)

    def note_generated(loaded, batches, policies, limit):
        rows = max(len(batch["input_ids"]) for batch in batches)
        judged[SINGLE if rows == 1 else "batches"].append([policy.name for policy in policies])
        return generate(loaded, batches, policies, limit)

    with patch.context() as patched:
        patched.setattr(ForcedSet, "score", note_one)
        patched.setattr(ForcedSet, "score_many", note_many)
        patched.setattr(tune, "_generate", note_generated)
        plan = TuneBench(3, 3, batch=2, together=2, max_new_tokens=4)
        rows = run_tune_bench(tiny, load_task("shapes:count,read"), plan, notes)
    assert notes.phases == [("bench tune", n, 8) for n in range(9)]
    return {row.method: row for row in rows}, judged


@pytest.mark.full  # a bench of its own
def test_every_way_judges_the_same_policies(bench):
    rows, judged = bench
    names = [[f"trial {i}" for i in part] for part in ((0, 1), (2, 3))]
    assert judged["together"] == judged["batches"] == names
    assert judged["alone"][1:] == [[name] for part in names for name in part]  # the first prepares
    assert judged[SINGLE] == [part[:1] for part in names]
    assert list(rows) == ["forced", "forced, 2 together", "generate, batch 2", SINGLE]
    assert [row.batch for row in rows.values()] == [2, 2, 2, 1]


@pytest.mark.full  # a bench of its own
def test_the_arithmetic_of_a_row(bench):
    rows, _ = bench
    naive = rows["generate, batch 2"]
    assert (naive.speedup, naive.speedup_low, naive.speedup_high, naive.break_even) == (1.0, 1.0, 1.0, None)
    for row in rows.values():
        assert row.trials_per_minute == pytest.approx(60 / row.trial_s)
        assert row.per_hour_low <= row.per_hour <= row.per_hour_high
        assert row.per_hour_low <= 3600 / row.trial_s <= row.per_hour_high
        assert (row.workers, row.cpu_s > 0) == (1, True)
        assert row.speedup_low <= row.speedup <= row.speedup_high
        assert (row.samples, row.rounds, row.device) == (3, 2, "cpu")
        assert 0 < row.answer_tokens < 4
        if row.break_even is not None:
            late = row.preparation_s + row.break_even * row.trial_s
            assert late < naive.preparation_s + row.break_even * naive.trial_s
            before = row.break_even - 1
            early = row.preparation_s + before * row.trial_s
            assert before == 0 or early >= naive.preparation_s + before * naive.trial_s
    assert rows["forced"].preparation_s == rows["forced, 2 together"].preparation_s > naive.preparation_s


def test_trials_keep_the_budget_and_are_those_of_the_default_search():
    prompts, evidence = [PromptShape(30, 1000, 20)], Evidence(6, 1000)
    policies = trial_policies(evidence, prompts, 70, 0.2, seed=1)
    space = Space()
    wanted = {scorer_spec(name).key for name in space.scorers}
    assert {policy.scorer.key for policy in policies} == wanted
    assert {policy.vision_bits for policy in policies} == set(BITS)
    assert {policy.text.bits for policy in policies} == set(space.text_bits)
    assert {policy.heads for policy in policies} == set(space.heads)
    assert (policies[0].scorer, policies[0].vision_bits) == (scorer_spec(RANKING), 4)
    shares = np.array([live_share(policy, prompts, 6) for policy in policies])
    kept_all = np.array([min(policy.keep(6)) == 1.0 for policy in policies])
    assert (shares <= 0.2 + 1e-9).all()
    assert np.allclose(shares[~kept_all], 0.2, atol=0.002)
    assert len({policy.hash for policy in policies if min(policy.keep(6)) < 1}) > 50
    assert trial_policies(evidence, prompts, 3, 0.2, seed=1) == policies[:3]
    assert trial_policies(evidence, prompts, 3, 0.2, seed=2)[1:] != policies[1:3]


@pytest.mark.full  # a process of its own, which imports torch
def test_a_process_of_its_own_scores_round_by_round():
    plan, notes = TuneBench(2, 4, batch=2, together=2, max_new_tokens=4), Notes()
    rows = run_side_by_side(ModelSpec(), TaskSpec("shapes:count,read"), plan, 1, notes)
    assert [row.method for row in rows] == ["forced, 1 process", "forced, 2 together, 1 process"]
    for row in rows:
        assert (row.workers, row.rounds, row.samples, row.break_even) == (1, 2, 2, None)
        assert row.per_hour == pytest.approx(3600 / row.trial_s)
        assert row.per_hour_low <= row.per_hour <= row.per_hour_high
        assert row.cpu_s > 0 and row.preparation_s > 0 and np.isnan(row.speedup)
    assert notes.phases[0] == ("side by side", 0, 4)
    assert notes.phases[-1] == ("side by side", 4, 4)


def test_processes_side_by_side_are_counted_together():
    one = TrialCost(
        *("forced", 3, 2, 5.0, "cpu", 3),
        *(0.5, 120.0, 7200.0, 7000.0, 7400.0, 0.4, 9.0, 8.0, 10.0, 3.0, 2),
    )
    slow, quick = [(0.5, 0.4), (1.0, 0.5), (0.25, 0.6)], [(0.2, 0.2), (0.4, 0.1), (0.1, 0.3)]
    (row,) = together([({"forced": one}, {"forced": slow}), ({"forced": one}, {"forced": quick})])
    by_round = [7200 + 18000, 3600 + 9000, 14400 + 36000]
    assert (row.method, row.workers) == ("forced, 2 processes", 2)
    assert (row.per_hour_low, row.per_hour, row.per_hour_high) == pytest.approx(
        (min(by_round), np.median(by_round), max(by_round))
    )
    assert row.trial_s == pytest.approx(3600 / 25200)
    assert row.trials_per_minute == pytest.approx(420)
    assert row.cpu_s == pytest.approx(0.35)
    assert (row.preparation_s, row.break_even) == (3.0, None)
    assert np.isnan([row.speedup, row.speedup_low, row.speedup_high]).all()


def test_the_error_that_stopped_the_others_is_the_one_that_is_told():
    parts = [Future(), Future(), Future()]
    parts[0].set_exception(threading.BrokenBarrierError())
    parts[1].set_exception(UserError("the budget is too small"))
    parts[2].set_exception(threading.BrokenBarrierError())
    with pytest.raises(UserError, match="the budget is too small"):
        side_by_side._results(parts)


@pytest.mark.parametrize(
    "change", [{"samples": 0}, {"trials": 0}, {"batch": 0}, {"together": 0}, {"budget": 1.2}]
)
def test_what_cannot_be_timed_is_refused(change):
    with pytest.raises(UserError, match="a tune bench needs samples, trials"):
        TuneBench(**({"samples": 2, "trials": 1} | change))


def test_answers_of_one_token_are_refused(tiny):
    with pytest.raises(UserError, match="every dense answer ends at its first token"):
        run_tune_bench(tiny, load_task("shapes"), TuneBench(2, 1, max_new_tokens=1))
