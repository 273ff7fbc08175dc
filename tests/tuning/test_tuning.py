"""A whole study of the embedded model: scores, proof, resuming, refusals, the commands, export."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

import avlprof
from avlprof.api.tune import study_name
from avlprof.api.tune import tune as tune_verb
from avlprof.cli import main
from avlprof.cli._app import app
from avlprof.errors import UserError
from avlprof.evaluation import AnswerSettings, generate_answers
from avlprof.locks import FolderLock
from avlprof.policy import (
    dump_policy,
    live_share,
    load_policy,
    parse_policy,
    read_share,
)
from avlprof.run import Run
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_task
from avlprof.tracing.options import TraceSettings
from avlprof.tuning import Settings, Space, export_policy, read_meta, read_study
from avlprof.tuning.study import finalists
from avlprof.watch import SILENT
from tests.helpers import settle_threads
from tests.search_space import outcome
from tests.watching import Notes

TASK, SAMPLES, LIMIT = "shapes:read", 6, 6
BUDGET, READ = 0.4, 0.35


# --- the whole of it, on the embedded model ---


class Study(NamedTuple):
    run: Run
    folder: Path
    tuned: avlprof.Tuned
    phases: list[str]


SETTINGS = Settings(
    read_budget=READ, trials=15, refine=0, samples=SAMPLES, proof_samples=4, max_new_tokens=LIMIT
)


def tuned(tiny, run, out, budget=BUDGET, task=TASK, watch=SILENT, **changes):
    """The study under test, with some settings changed."""
    return tune_verb(tiny, task, budget, replace(SETTINGS, **changes), run=run, out=out, watch=watch)


@pytest.fixture(scope="module")
def study(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("tuning")
    run = avlprof.trace(tiny, TASK, 3, TraceSettings(max_new_tokens=LIMIT), out=root / "run")
    notes = Notes()
    result = tuned(tiny, run, root / "study", watch=notes)
    phases = [name for name, done, total in notes.phases if done == total]
    return Study(run, root / "study", result, phases)


@pytest.fixture(scope="module")
def forced(tiny):
    return ForcedSet.prepare(tiny, load_task(TASK).samples("search", SAMPLES), max_new_tokens=LIMIT)


@pytest.mark.full  # needs a whole study
def test_values_are_the_mean_kl_of_the_noted_policy(study, forced):
    trials = study.tuned.study.get_trials()
    assert len(trials) == 15
    starts = [start.allocator for start in Space().starts()]
    assert [trial.params["allocator"] for trial in trials[:8]] == starts[:8]
    for trial in trials:
        policy = parse_policy(trial.user_attrs["policy"])
        wanted = np.mean([score.kl for score in forced.score(policy)])
        assert trial.user_attrs["complete"]
        assert trial.value == pytest.approx(wanted, abs=1e-5)
        assert trial.intermediate_values.keys() == set(range(SAMPLES))
        assert trial.user_attrs["live_share"] == live_share(policy, forced.shapes, 6) <= BUDGET
        steps = max(round(forced.answer_tokens), 1)
        assert trial.user_attrs["read_share"] == read_share(policy, forced.shapes, 6, steps) <= READ
    assert study.phases == ["dense answers", "probe", "trials", "rivals", "finalists", "proof", "knobs"]


@pytest.mark.full  # a study of its own
def test_a_search_chooses_how_much_smaller_pictures_are(tiny, study, tmp_path):
    """The closing policy says it, refined by layer, beside rivals that have and have not."""
    bits = {"bits": (16,), "text_bits": (16,)}
    shown = Space(("uniform",), ("instruction",), pictures=("pooled",), picture_shares=(0.5,), **bits)
    less = {"read_budget": None, "trials": 4, "refine": 2, "samples": 3, "proof_samples": 2, "finalists": 1}
    found = tuned(tiny, study.run, tmp_path, space=shown, **less)
    policy, proof = load_policy(tmp_path / "policy.yaml"), found.policy.provenance
    assert (policy.pictures.kind, policy.pictures.share) == ("pooled", 0.5)
    assert proof.measured_budget <= BUDGET and found.refined is not None
    assert {"pooled", "uniform, whole pictures"} <= set(proof.scores)
    assert found.knobs["value"][found.knobs["knob"] == "pictures"].tolist() == ["pooled to 0.5"]
    for trial in [*found.study.get_trials(), *found.refined.get_trials()]:
        one = parse_policy(trial.user_attrs["policy"])
        assert one.pictures == policy.pictures and trial.user_attrs["live_share"] <= BUDGET
    with pytest.raises(UserError, match="space"):
        tuned(tiny, study.run, tmp_path, space=replace(shown, pictures=("whole",)), **less)


def test_pictures_of_one_size_are_refused_before_a_run_is_traced(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings(samples=2, proof_samples=2, space=Space(pictures=("whole", "resized")))
    with pytest.raises(UserError, match="as many vision tokens"):
        avlprof.tune(tiny, TASK, BUDGET, settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full  # needs a whole study
def test_the_metric_decides_among_the_finalists(study, tiny):
    best = finalists(study.tuned.study, 3)
    task = load_task(TASK)
    samples = task.samples("search", SAMPLES)
    scores = []
    for trial in best:
        policy = parse_policy(trial.user_attrs["policy"])
        answers = generate_answers(tiny, samples, policy, AnswerSettings(LIMIT, 32, task.metric))
        scores.append(np.mean([answer.score for answer in answers]))
    assert study.tuned.policy.provenance.trial == best[int(np.argmax(scores))].number


@pytest.mark.full  # needs a whole study
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


@pytest.mark.full  # the search once more
def test_the_same_seed_in_a_fresh_folder_finds_the_same(study, tiny, tmp_path):
    again = tuned(tiny, study.run, tmp_path / "again", trials=3)
    first = outcome(study.tuned.study)[:3]
    assert outcome(again.study) == first
    more = tuned(tiny, study.run, tmp_path / "again")
    assert outcome(more.study) == outcome(study.tuned.study)
    assert more.policy.hash == study.tuned.policy.hash
    assert len(more.study.get_trials()) == 15


@pytest.mark.full  # needs a whole study
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0.5}, "holds another study (budget: 0.4 here, 0.5 asked)"),
        ({"read_budget": None}, "read_budget: 0.35 here, None asked"),
        ({"task": "shapes:row"}, "task: 'shapes:read' here, 'shapes:row' asked"),
        ({"samples": 5}, "samples: 6 here, 5 asked"),
        ({"seed": 7}, "seed: 0 here, 7 asked"),
        ({"space": Space(("uniform",))}, "space.allocators"),
        ({"objective": "accuracy"}, "objective: 'fidelity' here, 'accuracy' asked"),
        ({"sampler": "random"}, "sampler: 'tpe' here, 'random' asked"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_study_in_the_folder_is_refused(study, tiny, changes, said):
    before = (study.folder / "study.json").read_text()
    with pytest.raises(UserError) as refusal:
        tuned(tiny, study.run, study.folder, **changes)
    assert said in str(refusal.value)
    assert str(study.folder) in str(refusal.value)
    assert (study.folder / "study.json").read_text() == before


@pytest.mark.full  # needs a whole study
def test_another_model_is_refused(study, tiny, tmp_path):
    other = replace(tiny, revision="0123")
    with pytest.raises(UserError, match=r"was traced on tiny .*, the model here is tiny 0123"):
        tuned(other, study.run, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    said = (
        rf"{study.folder} holds another study \(model_hash: '\w+' here, '0123' asked\); choose another folder"
    )
    with pytest.raises(UserError, match=said):
        tuned(other, None, study.folder)


@pytest.mark.full  # needs a whole study
def test_what_is_no_study_is_left_alone(study, tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not a study"):
        tuned(tiny, study.run, tmp_path)
    with pytest.raises(UserError, match="is a file; give a folder"):
        tuned(tiny, study.run, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.full  # needs a whole study
def test_an_infeasible_budget_makes_no_folder(study, tiny, tmp_path):
    with pytest.raises(UserError, match=r"^budget 0\.01 is below 0\.\d+, what system and text alone need"):
        tuned(tiny, study.run, tmp_path / "new", budget=0.01)
    with pytest.raises(UserError, match=r"^read budget 0\.01 is below 0\.\d+"):
        tuned(tiny, study.run, tmp_path / "new", read_budget=0.01)
    assert not (tmp_path / "new").exists()


@pytest.mark.full  # needs a whole study
def test_a_folder_that_is_worked_on_is_left_alone(study, tiny):
    lock = FolderLock(study.folder)
    try:
        with pytest.raises(UserError, match="another process is writing to"):
            tuned(tiny, study.run, study.folder)
    finally:
        lock.release()


def test_study_names():
    settings = Settings(read_budget=0.2, seed=3)
    model, task = SimpleNamespace(name="org/some model"), SimpleNamespace(name="a:b,c")
    assert study_name(model, task, settings, "b0.25") == "some-model-a-b-c-b0.25-r0.2-s3"
    assert (
        study_name(SimpleNamespace(name="tiny"), load_task("shapes"), Settings(), "b0.2")
        == "tiny-shapes-b0.2"
    )


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


def killed(arguments, reports, said):
    """Run a command in a process that is killed when so many samples are reported; its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        settle_threads()
        report, calls = optuna.Trial.report, itertools.count(1)

        def report_or_die(trial, value, step):
            report(trial, value, step)
            if next(calls) == reports:
                os.kill(os.getpid(), signal.SIGKILL)

        optuna.Trial.report = report_or_die
        sys.stdout = sys.stderr = said.open("w", buffering=1)
        sys.argv = ["avlprof", *arguments]
        main()
    finally:
        os._exit(1)


@pytest.mark.full  # processes of their own, one of them killed
def test_kill_9_in_a_trial_loses_and_repeats_none(study, tmp_path):
    """The process dies with two samples of its fourth trial reported; then the same command."""
    folder = tmp_path / "killed"
    arguments = command(study, folder, "--format", "json")
    status = killed(arguments, 3 * SAMPLES + 2, tmp_path / "said.txt")
    said = (tmp_path / "said.txt").read_text()
    assert status == -signal.SIGKILL, said
    states = [trial.state.name for trial in read_study(folder).get_trials()]
    assert states == ["COMPLETE"] * 3 + ["RUNNING"]
    assert "no trial" not in said
    assert "Warning" not in said
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
    line = f"avlprof evaluate --policy {folder / 'policy.yaml'} --model tiny --device cpu"
    assert last == f"next: {line} --task {TASK} --max-new-tokens {LIMIT}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", 0], "trials must be 1 or more, got 0"),
        (["--budget", 1.2], "budget must be in [0, 1]"),
        (["--samples", 1], "samples must be 2 or more, got 1"),
        (["--task", "shpes"], "unknown task 'shpes'; did you mean shapes or pages or shapes-sizes?"),
        (["--run", "no/such/run"], "no/such/run"),
        (["--model", "tinny"], "unknown model 'tinny'; did you mean tiny or tiny-mrope?"),
    ],
)
def test_tune_refuses(arguments, said, tmp_path):
    assert said in refused("tune", *arguments, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.full  # needs a whole study
def test_tune_refuses_a_folder_of_another_study(study):
    said = refused(*command(study, study.folder, "--seed", 9))
    assert said == f"{study.folder} holds another study (seed: 0 here, 9 asked); choose another folder"


# --- export ---


@pytest.mark.full  # needs a whole study
def test_export_gives_the_proved_winner(study, tmp_path):
    result = invoke("export", study.folder, "-o", tmp_path / "winner.yaml")
    assert result.exit_code == 0, result.output
    assert result.stderr.rstrip().endswith(f"next: avlprof policy show {tmp_path / 'winner.yaml'}")
    text = (tmp_path / "winner.yaml").read_text()
    assert text == (study.folder / "policy.yaml").read_text()
    assert dump_policy(load_policy(tmp_path / "winner.yaml")) == text
    assert invoke("export", study.folder).stdout == text
    assert load_policy(tmp_path / "winner.yaml") == study.tuned.policy


@pytest.mark.full  # needs a whole study
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


@pytest.mark.full  # needs a whole study
def test_export_gives_a_point_of_the_front(study):
    trials = study.tuned.study.get_trials()
    for limit in sorted({trial.user_attrs["read_share"] for trial in trials}):
        policy = export_policy(study.folder, max_read=limit)
        wanted = min(
            (t for t in trials if t.user_attrs["read_share"] <= limit), key=lambda t: (t.value, t.number)
        )
        assert policy.provenance.trial == wanted.number


@pytest.mark.full  # needs a whole study
def test_export_refuses(study, tmp_path):
    assert "has no finished trial 99; the 15 finished ones are below 15" in refused(
        "export", study.folder, "--trial", 99
    )
    assert "not both" in refused("export", study.folder, "--trial", 1, "--max-read", 0.3)
    assert "--max-read must be in [0, 1]" in refused("export", study.folder, "--max-read", 2)
    said = refused("export", study.folder, "--max-read", 0.01)
    enough = float(said.rsplit(" ", 1)[1])
    assert export_policy(study.folder, max_read=enough).provenance.trial is not None
    assert "is not a study" in refused("export", tmp_path)
    assert "is not a study" in refused("export", tmp_path / "none")
    (tmp_path / "study.json").write_text((study.folder / "study.json").read_text())
    assert "has no trial yet" in refused("export", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
    (tmp_path / "study.json").write_text("{}")
    assert "is not the note of a study" in refused("export", tmp_path)
    assert read_meta(study.folder).model == "tiny"
