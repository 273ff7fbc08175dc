"""The public names at work on the embedded model, in the order of a first hour."""

from __future__ import annotations

from dataclasses import replace

import pytest

import avlprof

SMALL = {"trials": 3, "refine": 0, "samples": 3, "proof_samples": 3, "max_new_tokens": 4}


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """A folder of its own for whatever is written without being told where."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("public")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(tiny, elsewhere):
    return avlprof.trace(tiny, "shapes:describe", samples=4)


@pytest.fixture(scope="module")
def policy(run):
    return run.profile().derive(budget=0.4)


@pytest.fixture(scope="module")
def task():
    """The embedded task, three samples of each split and short answers."""
    return replace(avlprof.load_task("shapes", max_new_tokens=4), default_samples=3)


def test_a_trace_gives_a_run(run, elsewhere):
    assert isinstance(run, avlprof.Run)
    assert (elsewhere / "runs").is_dir()
    assert len(run.samples()) == 4
    assert avlprof.latest_run().path == run.path


def test_a_run_gives_a_profile_of_tables(run):
    profile = run.profile()
    drift = profile["drift"]
    assert {"layer", "lag"} <= set(drift.columns)
    assert len(drift) > 0
    drift.iloc[:] = 0
    assert not profile["drift"].equals(drift), "a table is a copy"


def test_a_profile_gives_a_policy(policy, tmp_path):
    assert isinstance(policy, avlprof.Policy)
    assert policy.provenance.measured_budget == pytest.approx(0.4, abs=0.01)
    avlprof.save_policy(policy, tmp_path / "mine.yaml")
    assert avlprof.load_policy(tmp_path / "mine.yaml") == avlprof.find_policy(str(tmp_path / "mine.yaml"))
    assert avlprof.load_policy(tmp_path / "mine.yaml").hash == policy.hash


@pytest.mark.full
def test_tuning_gives_a_study_and_its_winner(tiny, run):
    tuned = avlprof.tune(tiny, "shapes", 0.4, avlprof.Settings(**SMALL), run=run)
    assert isinstance(tuned, avlprof.Tuned)
    study = avlprof.Study.open(tuned.folder)
    overview = study.overview()
    assert (overview.state, overview.done, overview.trials) == ("not shown", 3, 3)
    assert overview.winner.hash == tuned.policy.hash
    assert study.export().hash == tuned.policy.hash
    first = study.export(trial=0)
    assert isinstance(first, avlprof.Policy)
    assert first.provenance.trial == 0


@pytest.mark.slow  # a study for each of five budgets
def test_a_front_and_the_smallest_budget(tiny, run):
    settings = avlprof.Settings(**SMALL)
    front = avlprof.sweep(tiny, "shapes", [0.3, 0.4], settings, run=run)
    assert [study.policy.provenance.budget for study in front.studies] == [0.3, 0.4]
    assert 1.0 in set(front.front()["budget"])
    least = avlprof.smallest(tiny, "shapes", 0.5, settings, run=run)
    assert 0 < least.budget < 1
    assert least.tuned.policy.provenance.budget == least.budget


@pytest.mark.full  # an evaluation with its latencies
def test_policies_are_judged_against_dense(tiny, task, policy):
    rows = avlprof.evaluate(tiny, task, [policy]).summary()
    assert {"dense", policy.name} <= set(rows["policy"])


@pytest.mark.slow  # every baseline that ships, at two budgets and on both splits
def test_policies_are_compared_at_equal_bytes(tiny, task, policy):
    rows = avlprof.compare(tiny, task, [0.3, 0.4], given=[policy]).summary()
    assert {0.3, 0.4} <= set(rows["budget"])
    assert {"dense", "uniform", policy.name} <= set(rows["method"])


def test_a_model_runs_under_a_policy_and_is_recorded(tiny, task, policy):
    sample = task.samples("held-out", 1)[0]
    inputs = tiny.adapter.encode([sample.prompt], [sample.open_images()])
    with avlprof.apply(tiny.model, policy) as runtime, avlprof.record(tiny.model) as recorder:
        tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    use = runtime.cache.use()[0]
    assert use.live < use.dense_prompt
    assert len(recorder.records) == 1
    assert {row["layer"] for row in recorder.records[0].frame()} == set(range(tiny.adapter.layers))


def test_a_model_is_loaded_by_name(tiny):
    loaded = avlprof.load_model("tiny", device="cpu")
    assert (loaded.name, loaded.revision) == (tiny.name, tiny.revision)
