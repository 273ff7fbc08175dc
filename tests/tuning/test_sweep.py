"""Sweeps over budgets: order, warm starts, one front, resuming; and the smallest budget of a drop."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import avlprof
from avlprof.api.tune import sweep
from avlprof.cli._live import HEADINGS, Board, board
from avlprof.cli._options import parse_shares
from avlprof.errors import UserError
from avlprof.evaluation import paired_difference
from avlprof.plots.front import budget_front, budget_front_info
from avlprof.policy import load_policy
from avlprof.tracing.options import TraceSettings
from avlprof.tuning import Candidate, Settings, Space
from avlprof.tuning.candidate import STARTS, noted_starts
from avlprof.tuning.smallest import smallest as smallest_verb
from avlprof.tuning.study import read_study
from tests.watching import Notes

TASK, LIMIT = "shapes:read", 6
SPACE = Space(("uniform", "pyramid"), ("last_query", "instruction"), ("shared",))
SETTINGS = Settings(trials=7, refine=2, samples=4, proof_samples=4, max_new_tokens=LIMIT, space=SPACE)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return avlprof.trace(
        tiny, TASK, 2, TraceSettings(max_new_tokens=LIMIT), out=tmp_path_factory.mktemp("run") / "run"
    )


@pytest.fixture(scope="module")
def swept(tiny, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "front"
    notes = Notes()
    result = sweep(tiny, TASK, (0.4, 0.15), SETTINGS, run=run, out=folder, watch=notes)
    return SimpleNamespace(result=result, folder=folder, began=notes.budgets)


@pytest.mark.full  # needs a sweep over two budgets
def test_budgets_run_upwards_and_each_starts_from_the_one_before(swept):
    assert swept.began == [0.15, 0.4]
    assert sorted(path.name for path in swept.folder.iterdir()) == ["b0.15", "b0.4", "front.csv"]
    best = min(read_study(swept.folder / "b0.15").get_trials(), key=lambda trial: (trial.value, trial.number))
    noted = json.loads((swept.folder / "b0.4" / STARTS).read_text())
    assert [Candidate(**start) for start in noted] == [Candidate.of(best.params)]
    assert not (swept.folder / "b0.15" / STARTS).exists()
    tried = [trial.params for trial in read_study(swept.folder / "b0.4").get_trials()]
    assert best.params in tried
    for budget in (0.15, 0.4):
        policy = load_policy(swept.folder / f"b{budget}" / "policy.yaml")
        assert policy.provenance.budget == budget >= policy.provenance.measured_budget
        assert policy.provenance.proof.strongest in policy.provenance.scores


@pytest.mark.full  # needs a sweep over two budgets
def test_the_front_holds_every_proof_and_dense_once(swept):
    front = pd.read_csv(swept.folder / "front.csv")
    assert (front["policy"] == "dense").sum() == 1
    assert sorted(front.loc[front["policy"] == "tuned", "budget"]) == [0.15, 0.4]
    for tuned in swept.result.studies:
        budget = tuned.policy.provenance.budget
        own = front[front["budget"] == budget].set_index("policy")
        for name, score in tuned.policy.provenance.scores.items():
            if name != "dense":
                assert own.loc[name, "score"] == pytest.approx(score.mean, abs=1e-6)
                assert own.loc[name, "live_share"] <= budget * 1.05


def trials_below(folder):
    """Values of all trials, by the folder of their study."""
    studies = sorted(path.parent for path in folder.rglob("journal.log"))
    return {study: [trial.value for trial in read_study(study).get_trials()] for study in studies}


@pytest.mark.slow  # the sweep once more
def test_the_same_sweep_resumes_without_a_new_trial(swept, tiny, run):
    before = trials_below(swept.folder)
    assert [len(values) for values in before.values()] == [5, 2, 5, 2]
    again = sweep(tiny, TASK, (0.15, 0.4), SETTINGS, run=run, out=swept.folder)
    assert trials_below(swept.folder) == before
    assert [one.policy.hash for one in again.studies] == [one.policy.hash for one in swept.result.studies]
    with pytest.raises(UserError, match="sampler: 'tpe' here, 'random' asked"):
        sweep(tiny, TASK, (0.15,), replace(SETTINGS, sampler="random"), run=run, out=swept.folder)


def test_sweeps_refuse_budgets_before_anything_runs(tiny, run, tmp_path):
    for budgets, said in (((), "at least one"), ((0.2, 0.2), "must be different"), ((0.4, 0.001), "below")):
        with pytest.raises(UserError, match=said):
            sweep(tiny, TASK, budgets, SETTINGS, run=run, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert parse_shares("--budgets", "0.1,0.2") == [0.1, 0.2]
    with pytest.raises(UserError, match="--budgets must be shares"):
        parse_shares("--budgets", "0.1;0.2")


@pytest.mark.full  # needs a sweep over two budgets
def test_the_front_is_drawn_with_tuned_first(swept):
    info = budget_front_info(swept.result.front())
    assert info.lines[0].name == "tuned"
    assert info.lines[0].live_share.tolist() == sorted(info.lines[0].live_share)
    dense = swept.result.studies[0].policy.provenance.scores["dense"]
    assert info.dense[0] == pytest.approx(dense.mean, abs=1e-6)
    figure = budget_front(info, "F1")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "dense"
    assert set(labels[1:]) == {line.name for line in info.lines}
    with pytest.raises(UserError, match="front of budgets"):
        budget_front_info(swept.result.front().drop(columns="live_bytes"))


# --- the smallest budget ---


def searched(drops, monkeypatch, tmp_path, drop, least=0.06):
    """`smallest` with a search whose winners lose `drops(budget)`; what was tried and tested."""
    module = sys.modules["avlprof.tuning.smallest"]
    tested = []

    def search(prepared, folder, memory, settings, *, starts=(), **others):
        loss = drops(memory)
        shortlist = SimpleNamespace(dense=np.ones(4), winner=SimpleNamespace(metric=np.full(4, 1 - loss)))
        candidate = Candidate(mix=memory)
        return SimpleNamespace(shortlist=shortlist, candidate=candidate, memory=memory, prepared=prepared)

    def prove_winner(done, watch):
        tested.append(done.memory)
        noise = np.resize([0.002, -0.002], 30)
        gap = paired_difference(1 - drops(done.memory) + noise, np.ones(30))
        scores = pd.DataFrame({"policy": "dense", "score": np.resize([0.0, 1.0], 30)})
        proof = SimpleNamespace(answers=scores)
        return SimpleNamespace(verdict=SimpleNamespace(differences={"dense": gap}), proof=proof)

    monkeypatch.setattr(module, "search", search)
    monkeypatch.setattr(module, "prove_winner", prove_winner)
    monkeypatch.setattr(module, "prepare", lambda *of: SimpleNamespace(least=least))
    found = smallest_verb(None, None, None, tmp_path / "drop", drop, Settings())
    return found, tested


@pytest.mark.parametrize("edge", [0.11, 0.3, 0.62, 0.9])
def test_bisection_finds_the_edge_and_tests_it_once(edge, monkeypatch, tmp_path):
    found, tested = searched(lambda b: 0.0 if b >= edge else 0.2, monkeypatch, tmp_path, 0.01)
    assert edge <= found.budget <= edge + 0.02 + 1e-9
    assert tested == [found.budget]
    assert len(found.tried) <= 7
    assert found.holds
    record = json.loads((tmp_path / "drop" / "smallest.json").read_text())
    assert record["budget"] == found.budget
    assert [entry["budget"] for entry in record["tried"]] == [budget for budget, _ in found.tried]
    assert f"smallest budget {found.budget:g}" in found.sentence()


def test_a_drop_that_nothing_holds_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no budget up to 1 holds a drop of 0\.01 on the search split"):
        searched(lambda b: 0.2, monkeypatch, tmp_path, 0.01)
    for value in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"^max_drop must be in \[0, 1\)"):
            searched(lambda b: 0.0, monkeypatch, tmp_path, value)


# --- starts of another budget, and the board ---


def test_a_resumed_study_keeps_its_own_starts(tmp_path):
    first = (Candidate("pyramid", mix=0.3),)
    assert noted_starts(tmp_path, first) == first
    assert noted_starts(tmp_path, (Candidate("coverage"),)) == first
    assert noted_starts(tmp_path, ()) == first
    (tmp_path / STARTS).write_text("[{}, 3]")
    with pytest.raises(UserError, match=r"starts\.json cannot be read"):
        noted_starts(tmp_path, ())


def trial(value, **params):
    known = {"allocator": "coverage", "scorer": "instruction", "mix": 0.25} | params
    return SimpleNamespace(number=1, value=value, user_attrs={"complete": True}, params=known)


def test_the_board_counts_this_process_only():
    """10 trials were there before; 6 more in 30 s are 12 a minute, and 4 are left."""
    now = [0.0]
    live = Board(write=lambda line: None, clock=lambda: now[0])
    live.phase("trace", 1, 2)
    assert live.cells() == []
    assert live.early == "trace 1/2"
    live.budget(0.2)
    live.phase("trials", 10, 20)
    now[0] = 30.0
    live.phase("trials", 16, 20)
    live.trial(None, trial(0.5))
    live.trial(None, trial(0.7))
    (row,) = live.cells()
    assert len(row) == len(HEADINGS)
    assert row == ["0.2", "0.5", "coverage, instruction, mix 0.25", "16/20", "12", "20 s", "trials 16/20"]
    live.phase("knobs", 3, 3)
    assert live.cells()[0][-1] == "done"
    live.budget(0.4)
    assert [cells[0] for cells in live.cells()] == ["0.2", "0.4"]


def test_the_board_is_lines_in_a_log(capsys):
    with board() as live:
        live.budget(0.1)
        live.phase("trials", 0, 2)
        live.trial(None, trial(0.5))
        live.trial(None, trial(0.6))
        live.phase("trials", 2, 2)
        live.budget(0.2)
        live.phase("trials", 0, 2)
        live.trial(None, trial(0.4, allocator="pyramid"))
    said = capsys.readouterr()
    assert said.out == ""
    assert "\x1b" not in said.err
    lines = said.err.splitlines()
    assert lines[0] == "budget 0.1"
    assert "trial 1: 0.5000 (coverage, instruction, mix 0.25)" in lines
    assert "trial 1: 0.4000 (pyramid, instruction, mix 0.25)" in lines
    assert not any("0.6000" in line for line in lines)
    assert sum(line.startswith("trials: 2 of 2") for line in lines) == 1
