"""Studies as they are listed, shown and opened, and evidence that all workers share."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from optuna.trial import create_trial
from typer.testing import CliRunner

import avlprof
from avlprof.allocators import Evidence
from avlprof.cli.studies import app
from avlprof.errors import UserError
from avlprof.policy import Policy, Provenance, Score, dump_policy, load_policy, save_policy
from avlprof.policy.provenance import Proof
from avlprof.tasks import load_task
from avlprof.tracing.options import TraceSettings
from avlprof.tuning import Settings, StudyMeta, read_meta, read_study
from avlprof.tuning.evidence import dump_evidence, parse_evidence, read_evidence, shared_evidence
from avlprof.tuning.reading import overview, studies_below
from avlprof.tuning.space import Space
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.study import as_begun, claim_folder
from avlprof.tuning.trials import note_goal, run_trials
from avlprof.tuning.workers import Workers, join
from tests.fake_study import Sleepy
from tests.helpers import ROOT

matplotlib.use("Agg")


def meta(**changed):
    values = {
        "model": "tiny", "model_hash": "a", "task": "shapes", "split": "search", "samples": 4,
        "sample_hash": "b", "max_new_tokens": 6, "dtype": "float32", "budget": 0.2, "read_budget": None,
        "seed": 0, "run_hash": "c", "space": {"allocators": ("uniform",), "refreshes": (0, 8)},
    }  # fmt: skip
    return StudyMeta(**(values | changed))


class Noted(Sleepy):
    """Notes what a real trial does; every third one is stopped early with a score that would win."""

    def __call__(self, trial):
        value = Sleepy.__call__(self, trial)
        cut = trial.number % 3 == 2
        trial.set_user_attr("complete", not cut)
        trial.set_user_attr("samples", 2 if cut else 4)
        trial.set_user_attr("live_share", 0.2 - value / 100)
        trial.set_user_attr("read_share", 0.1)
        return -1.0 if cut else value


def test_a_study_of_before_goes_on_with_what_was_searched_then(tmp_path):
    """Without bits and what a refresh ranks by, unless they are asked for by choice."""
    settings = Settings(space=Space())
    asked = Settings(space=Space(bits=(4,), text_bits=(4,), core_prompts=(0.3,)))
    assert as_begun(tmp_path / "none yet", settings) == settings
    claim_folder(tmp_path / "old", meta())
    found = as_begun(tmp_path / "old", settings).space
    assert (found.bits, found.text_bits) == ((16,), (16,))
    assert (found.core_prompts, found.core_memories) == ((0.0,), (0.0,))
    alone = replace(asked, space=replace(asked.space, leaders=(0,)))  # who leads was not asked for by choice
    assert as_begun(tmp_path / "old", asked) == alone
    claim_folder(tmp_path / "bits", meta(space=Space(core_prompts=(0.0,), core_memories=(0.0,)).described()))
    found = as_begun(tmp_path / "bits", settings).space
    assert (found.bits, found.core_prompts) == (Space().bits, (0.0,))
    claim_folder(tmp_path / "new", meta(space=Space().described()))
    assert as_begun(tmp_path / "new", settings) == settings
    assert Space.of(read_meta(tmp_path / "new").space) == Space()


def run(folder, trials, **changed):
    claim_folder(folder, meta(**changed))
    return run_trials(FolderStorage(folder), Settings(trials=trials, prune=False), Noted())


def prove(folder, **proof):
    """A winner as the proof writes it."""
    scores = {
        "tuned": Score(mean=0.75, low=0.7, high=0.8, samples=9),
        "dense": Score(mean=0.9, low=0.8, high=1.0, samples=9),
    }
    noted = {"split": "held-out", "samples": 9, "strongest": "uniform", "margin": 0.02, "non_inferior": True}
    origin = Provenance(metric="exact_match", scores=scores, proof=Proof(**noted | proof))
    save_policy(Policy(name="tuned", vision_keep=0.5, provenance=origin), folder / "policy.yaml")
    (folder / "knobs.csv").write_text("knob,value,plain,change,low,high\nscorer,b,None,0.5,0.25,0.75\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One study of each state: proved, searched only, stopped in the middle, and without any trial."""
    root = tmp_path_factory.mktemp("studies")
    run(root / "done", 10)
    prove(root / "done")
    run(root / "searched", 6)
    run(root / "sweep" / "half", 5, read_budget=0.1, task="docs")
    FolderStorage(root / "sweep" / "half").open().set_user_attr("trials", 40)
    claim_folder(root / "fresh", meta(budget=0.4))
    (root / "no study").mkdir()
    return root


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_ls_tells_every_study(root):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    rows = json.loads(invoke("ls", root, "--format", "json").stdout)
    assert [(row["name"], row["state"], row["trials"], row["wanted"]) for row in rows] == [
        ("done", "proved", 10, 10),
        ("fresh", "new", 0, None),
        ("searched", "unproved", 6, 6),
        ("sweep/half", "stopped", 5, 40),
    ]
    whole = [t for t in read_study(root / "done").trials if t.user_attrs["complete"]]
    assert rows[0]["best"] == min(trial.value for trial in whole) > 0
    assert [row["held-out"] for row in rows] == [0.75, None, None, None]
    assert (rows[3]["task"], rows[3]["budget"], rows[3]["read budget"]) == ("docs", 0.2, 0.1)
    table = invoke("ls", root)
    assert "10/10" in table.stdout and "5/40" in table.stdout and "0/-" in table.stdout
    assert "40.0%" in table.stdout
    assert {path: path.read_bytes() for path in before} == before


def test_ls_without_studies_says_how_to_make_one(tmp_path):
    result = invoke("ls", tmp_path / "none")
    assert result.stdout.strip() == ""
    assert "avlprof tune" in result.stderr


def test_a_study_at_work_is_running(root):
    storage = FolderStorage(root / "sweep" / "half")
    with storage.join(True):
        assert overview(storage.folder).state == "running"
    assert overview(storage.folder).state == "stopped"


def test_studies_are_found_at_any_depth(root):
    assert [path.name for path in studies_below(root)] == ["done", "fresh", "searched", "half"]
    assert studies_below(root / "done") == [root / "done"]


def test_show_gives_the_best_whole_trials(root):
    study = read_study(root / "done")
    whole = sorted((t.value, t.number) for t in study.trials if t.user_attrs["complete"])
    rows = json.loads(invoke("show", root / "done", "--trials", 3, "--format", "json").stdout)
    assert [(row["score"], row["trial"]) for row in rows] == whole[:3]
    for row in rows:
        trial = study.trials[row["trial"]]
        assert {"x": row["x"], "kind": row["kind"]} == trial.params
        assert (row["live"], row["read"], row["samples"]) == (trial.user_attrs["live_share"], 0.1, 4)
    written = list(csv.DictReader(io.StringIO(invoke("show", root / "done", "--format", "csv").stdout)))
    assert [int(row["trial"]) for row in written] == [number for _, number in whole]
    table = invoke("show", root / "done")
    assert "10.0%" in table.stdout
    assert "kind a" in table.stdout
    assert "10 of 10 trials, proved" in table.stderr
    assert "scorer b instead of None: +0.5000 [+0.2500, +0.7500]" in table.stderr
    assert str(root / "done" / "policy.yaml") in table.stderr


@pytest.mark.parametrize(
    "proof",
    [
        {"non_inferior": False},
        {"non_inferior": False, "doubts": ("dense scores 0 on every sample",)},
        {"differences": {"uniform": {"mean": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}}},
    ],
)
def test_a_study_whose_proof_shows_nothing_is_not_proved(tmp_path, proof):
    run(tmp_path / "done", 2)
    prove(tmp_path / "done", **proof)
    (row,) = json.loads(invoke("ls", tmp_path, "--format", "json").stdout)
    assert (row["state"], row["held-out"]) == ("not shown", 0.75)
    assert "2 of 2 trials, not shown" in invoke("show", tmp_path / "done").stderr


def test_a_study_is_opened_and_read(root):
    study = avlprof.Study.open(root / "done")
    assert (study.meta.model, study.overview().state, study.overview().done) == ("tiny", "proved", 10)
    whole = sorted((t.value, t.number) for t in study.optuna().trials if t.user_attrs["complete"])
    table = study.trials()
    assert list(zip(table["score"], table["trial"], strict=True)) == whole
    assert {"live", "read", "samples", "x", "kind"} <= set(table.columns)
    assert study.trials(best=2).equals(table.head(2))
    assert study.importances().empty
    assert study.export() == load_policy(root / "done" / "policy.yaml")
    with pytest.raises(UserError, match="has no trial yet"):
        avlprof.Study.open(str(root / "fresh")).trials()
    with pytest.raises(UserError, match="is not a study"):
        avlprof.Study.open(root / "no study")


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("fidelity", "KL to dense 0.1250 nat per token on 4 of 4 samples"),
        ("likelihood", "negative log-likelihood 0.1250 nat per token on 4 of 4 samples"),
        ("accuracy", "1 - task metric 0.1250 on 4 of 4 samples"),
    ],
)
def test_an_exported_trial_says_what_it_was_scored_by(tmp_path, objective, said):
    claim_folder(tmp_path, meta(objective=objective))
    study = FolderStorage(tmp_path).open()
    policy = dump_policy(Policy(vision_keep=(0.5, 0.25)))
    attributes = {"policy": policy, "complete": True, "samples": 4, "live_share": 0.2, "read_share": 0.1}
    study.add_trial(create_trial(value=0.125, user_attrs=attributes))
    notes = avlprof.Study.open(tmp_path).export(trial=0).provenance.notes
    assert notes == f"{said} of split 'search'; not proved on held-out samples"


def test_show_refuses_what_is_no_study(root):
    for folder, said in ((root / "no study", "is not a study"), (root / "fresh", "has no trial yet")):
        result = CliRunner().invoke(app, ["show", str(folder)])
        assert isinstance(result.exception, UserError)
        assert said in str(result.exception)


def test_a_database_out_of_reach_does_not_hide_the_others(tmp_path):
    run(tmp_path / "here", 2)
    claim_folder(tmp_path / "far", meta())
    (tmp_path / "far" / "storage.txt").write_text("postgresql+psycopg://nobody@127.0.0.1:1/none\n")
    rows = json.loads(invoke("ls", tmp_path, "--format", "json").stdout)
    assert [(row["name"], row["state"]) for row in rows] == [("far", "out of reach"), ("here", "unproved")]


# --- the dashboard ---


def get(address):
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read()


@pytest.fixture
def opened(tmp_path):
    """The address of a study in the dashboard, opened by the command."""
    pytest.importorskip("optuna_dashboard", reason="the extra 'dashboard' is not installed")
    from avlprof import plots

    run(tmp_path / "study", 5)
    prove(tmp_path / "study")
    figure = plots.policy_layers(Policy(vision_keep=(0.2, 0.4)), layers=2)
    plots.save_figure(figure, tmp_path / "study" / "figures" / "layers.png")
    server = subprocess.Popen(
        [sys.executable, "-m", "avlprof", "studies", "open", str(tmp_path / "study"), "--port", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = server.stderr.readline()
        assert line.startswith("open http://127.0.0.1:"), line + server.stderr.read()
        yield tmp_path / "study", line.split()[1].split("/dashboard")[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.full  # starts the dashboard
def test_the_dashboard_shows_trials_note_and_figures(opened):
    from avlprof.tuning.dashboard import attach

    folder, address = opened
    (study,) = json.loads(get(f"{address}/api/studies"))["study_summaries"]
    assert study["study_name"] == "avlprof"
    number = study["study_id"]
    detail = json.loads(get(f"{address}/api/studies/{number}?after=0"))
    assert len(detail["trials"]) == 5
    text = detail["note"]["body"]
    assert "| tuned | 0.750 | 0.700 to 0.800 |" in text
    assert "scorer b instead of None" in text
    (artifact,) = detail["artifacts"]
    figure = (folder / "figures" / "layers.png").read_bytes()
    assert get(f"{address}/artifacts/{number}/{artifact['artifact_id']}") == figure
    assert f"](/artifacts/{number}/{artifact['artifact_id']})" in text
    before = (folder / "journal.log").read_bytes()
    attach(folder)
    assert (folder / "journal.log").read_bytes() == before


# --- evidence ---


def test_evidence_comes_back_bit_by_bit():
    rng = np.random.default_rng(3)
    coverage = rng.random((3, 40)).cumsum(axis=1) / 7
    evidence = Evidence(3, 40, coverage=coverage, damage=rng.standard_normal((3, 5)))
    again = parse_evidence(dump_evidence(evidence), "here")
    assert (again.layers, again.tokens, again.entropy) == (3, 40, None)
    np.testing.assert_array_equal(again.coverage, evidence.coverage)
    np.testing.assert_array_equal(again.damage, evidence.damage)


def test_evidence_is_made_once_and_waited_for(tmp_path):
    storage, made, found = FolderStorage(tmp_path), [], []

    def make():
        time.sleep(0.05)
        made.append(np.random.default_rng().random((2, 9)))
        return Evidence(2, 9, coverage=made[-1])

    def ask():
        found.append(shared_evidence(storage, make))

    with pytest.raises(UserError, match="is not begun; begin it with 'avlprof tune'"):
        read_evidence(storage)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    for evidence in found:
        np.testing.assert_array_equal(evidence.coverage, made[0])
    storage.open()
    np.testing.assert_array_equal(read_evidence(storage).coverage, made[0])
    (tmp_path / "evidence.json").write_text("[1]")
    with pytest.raises(UserError, match="cannot be read"):
        read_evidence(storage)


# --- joining ---

TASK, BUDGET, SAMPLES, LIMIT = "shapes:read", 0.4, 4, 6


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A study of the embedded model by one process, without refinement."""
    root = tmp_path_factory.mktemp("tuned")
    traced = avlprof.trace(tiny, TASK, 2, TraceSettings(max_new_tokens=LIMIT), out=root / "run")
    settings = Settings(trials=9, refine=0, samples=SAMPLES, proof_samples=2, max_new_tokens=LIMIT)
    avlprof.tune(tiny, TASK, BUDGET, settings, run=traced, out=root / "study")
    return tiny, traced, root / "study"


def begun(tuned, folder):
    """The same study, begun elsewhere and without any trial."""
    _, traced, study = tuned
    storage = FolderStorage(folder)
    claim_folder(folder, read_meta(study))
    damage = json.loads((study / "probe.json").read_text())
    evidence = replace(
        traced.profile().evidence(),
        damage=np.array(damage["damage"]),
        damage_levels=np.array(damage["levels"]),
    )
    shared_evidence(storage, lambda: evidence)
    note_goal(storage, Settings(trials=9))
    return storage


def outcome(study):
    return [(t.params, t.value, t.user_attrs["policy"]) for t in study.trials if t.state.name == "COMPLETE"]


@pytest.mark.slow  # the search once more
def test_who_joins_searches_what_the_study_says(tuned, tmp_path):
    """One worker that joins, without run or settings, runs the very trials of `avlprof.tune`."""
    loaded, _, study = tuned
    found = join(loaded, load_task(TASK), begun(tuned, tmp_path / "here"))
    assert outcome(found) == outcome(read_study(study))
    assert len(outcome(found)) == 9


@pytest.mark.full  # needs a study with its proof
def test_another_task_or_a_study_not_begun_is_refused(tuned, tmp_path):
    loaded, _, study = tuned
    storage = begun(tuned, tmp_path / "here")
    with pytest.raises(UserError, match=f"task: '{TASK}' here, 'shapes:count' asked; sample_hash"):
        join(loaded, load_task("shapes:count"), storage)
    with pytest.raises(UserError, match="is not a study"):
        join(loaded, load_task(TASK), FolderStorage(tmp_path / "none"))
    claim_folder(tmp_path / "claimed", read_meta(study))
    with pytest.raises(UserError, match="is not begun; begin it with 'avlprof tune'"):
        join(loaded, load_task(TASK), FolderStorage(tmp_path / "claimed"))
    assert read_study(storage.folder).trials == []
    with pytest.raises(UserError, match=r"workers must be 1 or more, got 0"):
        Workers(0)


def test_of_two_spaces_the_parts_that_differ_are_named():
    one, eight, full = (meta(space=Space(bits=bits).described()) for bits in ((16, 4), (8,), (16,)))
    assert one.differences(eight) == ["space.bits: (16, 4) here, (8,) asked"]
    assert one.differences(full) == ["space.bits: (16, 4) here, None asked"]
    assert one.differences(one) == []
