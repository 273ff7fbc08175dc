"""What version 0.1.0 wrote: its runs, policies and studies are read, and go on.

`data/0.1.0` was written by that version, from left to right: a run of two samples, a policy derived
from it, a run of one sample under that policy, and a study of four trials with its proof::

    avlprof trace -t shapes:describe -n 2 --max-new-tokens 4 --out run
    avlprof derive run --budget 0.4 --read-budget 0.3 --refresh-interval 2 --name derived --out derived.yaml
    avlprof trace -t shapes:describe -n 1 --max-new-tokens 4 --policy derived.yaml --out under-a-policy
    avlprof tune -t shapes:describe --budget 0.4 --read-budget 0.35 --run run --trials 4 -n 4
                 --proof-samples 4 --max-new-tokens 4 --refine 0 --out study

To save room the saved profile, the figures and three parts of the study's answers were deleted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import avlprof
from avlprof.cli._app import app

DATA = Path(__file__).parent / "data" / "0.1.0"
TRACE = ("trace", "--task", "shapes:describe", "--max-new-tokens", 4, "--device", "cpu")
TUNE = (
    *("tune", "--task", "shapes:describe", "--budget", 0.4, "--read-budget", 0.35, "--samples", 4),
    *("--proof-samples", 4, "--max-new-tokens", 4, "--refine", 0, "--device", "cpu"),
)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the files, which a test may change, as working directory."""
    shutil.copytree(DATA, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="avlprof")
    assert done.exit_code == 0, done.output
    return done


def test_a_run_is_opened(old):
    run = avlprof.Run.open("run")
    assert run.meta.versions["avlprof"] == "0.1.0"
    assert (run.meta.model, run.meta.task, run.meta.max_new_tokens) == ("tiny", "shapes:describe", 4)
    samples = run.samples()
    assert len(samples) == 2
    assert list(samples["vision"]) == [196, 196]
    scores = run.scores(samples["sample"][0])
    assert scores["last"].shape == (6, 196)
    assert np.isfinite(scores["last"]).all()
    assert set(run.stats()["layer"]) == set(range(6))
    assert avlprof.latest_run(old).path.resolve() in {old / "run", old / "under-a-policy"}


def test_a_run_gives_the_policy_that_it_gave(old):
    """The profile of today's code, and what it derives with A-VL's ranking, the default of 0.1.0.

    The query `answer` adds weights since, which moves one token of 196 from one layer to another.
    """
    written = avlprof.load_policy("derived.yaml")
    derived = (
        avlprof.Run.open("run")
        .profile()
        .derive(budget=0.4, read_budget=0.3, refresh_interval=2, scorer="last_query")
    )
    moved = [round(196 * (a - b)) for a, b in zip(derived.vision_keep, written.vision_keep, strict=True)]
    assert moved == [0, -1, 0, 0, 0, 1]
    assert derived.model_copy(update={"vision_keep": written.vision_keep}).hash == written.hash
    assert derived.provenance.run_hash == written.provenance.run_hash


BEGUN = "not noted by avlprof 0.1.0, which began this"


def refused(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="avlprof")
    assert done.exit_code == 2, done.output
    assert BEGUN in done.output


def test_a_run_is_not_gone_on_with(old):
    """What decides its answers beside the weights was not noted, so what is added might differ."""
    refused(*TRACE, "--samples", 3, "--out", "run")
    assert len(avlprof.Run.open("run").samples()) == 2


def test_a_run_under_a_policy_is_opened(old):
    run = avlprof.Run.open("under-a-policy")
    policy = avlprof.load_policy("derived.yaml")
    noted = json.dumps(run.meta.model_dump(mode="json"))
    assert policy.name in noted
    assert policy.hash in noted
    assert len(run.profile().per_layer()) == 6
    refused(*TRACE, "--samples", 2, "--policy", "derived.yaml", "--out", "under-a-policy")


@pytest.mark.parametrize(("path", "name"), [("derived.yaml", "derived"), ("study/policy.yaml", "tuned")])
def test_a_policy_is_loaded(old, path, name):
    policy = avlprof.load_policy(path)
    assert policy.name == name
    assert policy.vision_keep[0] == 0.372449
    assert policy.refresh_interval == {"derived": 2, "tuned": 8}[name]
    made_by = {"derived": "avlprof derive 0.1.0", "tuned": "avlprof tune 0.1.0"}[name]
    assert policy.provenance.made_by == made_by
    assert policy.provenance.versions["avlprof"] == "0.1.0"
    assert 0.39 < policy.provenance.measured_budget < 0.4
    avlprof.save_policy(policy, "again.yaml")
    assert Path("again.yaml").read_text() == Path(path).read_text()


def test_a_study_is_shown(old):
    (row,) = json.loads(invoke("studies", "ls", ".", "--format", "json").stdout)
    # its proof said yes of 4 samples without any difference, which shows nothing
    assert (row["name"], row["trials"], row["wanted"], row["state"]) == ("study", 4, 4, "not shown")
    rows = json.loads(invoke("studies", "show", "study", "--format", "json").stdout)
    assert [row["trial"] for row in rows] == [0, 3, 1, 2]
    assert [row["allocator"] for row in rows] == ["uniform", "coverage", "pyramid", "sigmoid"]
    assert rows[0]["score"] == pytest.approx(9.45e-5, abs=1e-7)
    invoke("studies", "show", "study")
    invoke("export", "study", "--trial", 3, "--out", "third.yaml")
    assert avlprof.load_policy("third.yaml").provenance.trial == 3


def test_a_study_is_not_gone_on_with(old):
    before = json.loads(invoke("studies", "show", "study", "--format", "json").stdout)
    refused(*TUNE, "--trials", 6, "--out", "study", "--run", "run")
    refused("studies", "join", "study", "--device", "cpu")
    assert json.loads(invoke("studies", "show", "study", "--format", "json").stdout) == before
