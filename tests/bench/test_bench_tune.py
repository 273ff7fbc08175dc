"""The tune bench: what it judges and counts; what it times is not judged here."""

from __future__ import annotations

import numpy as np
import pytest

from avlprof.bench import tune
from avlprof.bench.tune import (
    REFRESHES,
    SCORERS,
    SINGLE,
    TuneBench,
    run_tune_bench,
    trial_policies,
)
from avlprof.errors import UserError
from avlprof.policy import PromptShape, live_share
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_task
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


def test_trials_keep_the_budget_in_the_mean_and_differ():
    policies = trial_policies(6, 40, 0.3, seed=1)
    assert len({policy.hash for policy in policies}) == 40
    assert {policy.refresh_interval for policy in policies} == set(REFRESHES)
    assert {policy.scorer.name for policy in policies} == set(SCORERS)
    shares = [live_share(policy, [PromptShape(0, 1000, 0)], 6) for policy in policies]
    assert np.allclose(shares, 0.3, atol=0.01)
    assert trial_policies(6, 3, 0.3, seed=1) == policies[:3]


@pytest.mark.parametrize(
    "change", [{"samples": 0}, {"trials": 0}, {"batch": 0}, {"together": 0}, {"budget": 1.2}]
)
def test_what_cannot_be_timed_is_refused(change):
    with pytest.raises(UserError, match="a tune bench needs samples, trials"):
        TuneBench(**({"samples": 2, "trials": 1} | change))


def test_answers_of_one_token_are_refused(tiny):
    with pytest.raises(UserError, match="every dense answer ends at its first token"):
        run_tune_bench(tiny, load_task("shapes"), TuneBench(2, 1, max_new_tokens=1))
