"""What several processes make together is what one makes alone: traces, evaluations, comparisons."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from avlprof.api.trace import plan_trace
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore, ComparisonSettings, EvaluationSettings
from avlprof.evaluation.compare import compare
from avlprof.evaluation.evaluate import evaluate
from avlprof.evaluation.shared import SharedStore, open_store, serve_answers
from avlprof.launchers import Launch, queue
from avlprof.launchers.queue import Queue
from avlprof.models import ModelSpec, load_model
from avlprof.policy import PicturePolicy, Policy, find_policy
from avlprof.runs import Shard
from avlprof.tasks import load_task
from avlprof.tasks.spec import TaskSpec
from avlprof.tracing.options import TraceSettings
from tests.fake_launcher import Held, threads
from tests.small_run import same_runs

COMPARED = ComparisonSettings(samples=3, batch_size=2, max_new_tokens=3, baselines=(find_policy("h2o"),))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def task():
    return load_task("shapes")


@pytest.fixture(scope="module")
def other():
    """The model of the worker: a model runs under one policy at a time."""
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def alone(tiny, task):
    return compare(tiny, task, [0.3], settings=COMPARED)


HALF = PicturePolicy(kind="pooled", share=0.5)


def shared(path, workers=2):
    return open_store(path, Launch(workers, "threads"), ModelSpec(), TaskSpec())


@pytest.mark.full  # a comparison, made again
@pytest.mark.parametrize("losing", [0, 1])
def test_a_comparison_is_that_of_one_process(tmp_path, monkeypatch, tiny, other, task, alone, losing):
    served = []

    def work(tasks, worker):
        served.append(serve_answers(other, task, tasks, worker))

    with threads(monkeypatch, work, losing) as begun, shared(tmp_path / "parts") as store:
        notes = Held(tmp_path / "parts", begun, losing)
        together = compare(tiny, task, [0.3], settings=COMPARED, store=store, watch=notes)
    pd.testing.assert_frame_equal(together.answers, alone.answers, check_exact=True)
    assert together.strongest == alone.strongest
    assert sum(served) > 0 or losing
    done = [done for done, _ in notes.counts("compare")]
    assert done == sorted(done) and done[-1] == notes.counts("compare")[-1][1]
    # resumed by one alone: nothing is left to answer, and the folder is as one process leaves it
    again = AnswerStore(tmp_path / "parts")
    monkeypatch.setattr("avlprof.evaluation.answers.answer_batch", None)
    resumed = compare(tiny, task, [0.3], settings=COMPARED, store=again)
    pd.testing.assert_frame_equal(resumed.answers, alone.answers, check_exact=True)


@pytest.mark.full  # two evaluations
def test_an_evaluation_is_that_of_one_process(tmp_path, monkeypatch, tiny, other, task):
    settings = EvaluationSettings(samples=3, batch_size=2, max_new_tokens=3, latency=False, fidelity=False)
    policies = [find_policy("streaming-llm"), Policy(name="half", pictures=HALF)]
    with threads(monkeypatch, lambda tasks, worker: serve_answers(other, task, tasks, worker)):
        with shared(tmp_path / "parts") as store:
            together = evaluate(tiny, task, policies, settings, store=store)
    plain = evaluate(tiny, task, policies, settings)
    pd.testing.assert_frame_equal(together.answers, plain.answers, check_exact=True)


@pytest.mark.full  # a trace, made again
@pytest.mark.parametrize("losing", [0, 1])
def test_a_trace_is_that_of_one_process(tmp_path, monkeypatch, tiny, other, task, losing):
    plan = plan_trace(tiny, task, 4, TraceSettings(max_new_tokens=2), out=tmp_path / "together")
    by = []

    def work(tasks, worker):
        by.append(replace(plan, loaded=other, shard=Shard(1, 2, member=worker)).serve(tasks))

    with threads(monkeypatch, work, losing) as begun:
        notes = Held(tmp_path / "together", begun, losing)
        run = plan.lead(Launch(2, "threads"), ["trace"], notes)
    one = replace(plan, out=tmp_path / "one").run()
    same_runs(run.directory, one.directory)
    assert sum(by) > 0 or losing
    assert [one.code() for one in begun] == [-9] * losing + [0]
    assert notes.counts("trace")[-1] == (4, 4)
    assert not list(run.path.glob(".lockw*"))
    files = sorted(path.name for path in run.path.iterdir())
    assert plan.lead(Launch(2, "threads"), ["trace"]).directory.hash == one.directory.hash
    assert sorted(path.name for path in run.path.iterdir() if path.name in files) == files


def test_without_workers_nobody_is_started(tmp_path):
    assert type(open_store(tmp_path, Launch(1, "ray"), ModelSpec(), TaskSpec())) is AnswerStore
    assert type(open_store(tmp_path, Launch(2), ModelSpec(), TaskSpec())) is SharedStore


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"model": "other@1"}, "the work is for other@1"), ({"asked": "?"}, "has other samples on")],
)
def test_a_worker_with_another_model_or_task_refuses(tmp_path, tiny, task, changed, said):
    asked = {
        "model": "", "parts": str(tmp_path), "policy": None, "split": "held-out", "count": 1,
        "samples": [task.samples("held-out", 1)[0].id], "asked": "", "max_new_tokens": 1,
        "batch_size": 1, "metric": "exact_match", "lengths": {},
    }  # fmt: skip
    if "model" not in changed:
        from avlprof.evaluation.store import model_key

        asked["model"] = model_key(tiny)
    tasks = Queue(tmp_path / "queue")
    with tasks.led():
        tasks.put("a", json.loads(json.dumps(asked | changed)))
        with pytest.raises(UserError, match=said):
            serve_answers(tiny, task, tasks, "w1")
    assert not list(tmp_path.glob("*.parquet"))
