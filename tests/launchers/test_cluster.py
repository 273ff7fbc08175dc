"""Ray and submitit: what a cluster makes together is what one process makes alone, whatever is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import replace

import pandas as pd
import pytest
from optuna.trial import TrialState

from avlprof.api.trace import plan_trace
from avlprof.errors import UserError
from avlprof.evaluation import ComparisonSettings
from avlprof.evaluation.compare import compare
from avlprof.evaluation.shared import SharedStore
from avlprof.launchers import Crew, Launch
from avlprof.models import ModelSpec
from avlprof.policy import find_policy
from avlprof.tasks import load_task
from avlprof.tasks.spec import TaskSpec
from avlprof.tracing.options import TraceSettings
from avlprof.tuning.storages._base import runs
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.workers import crew_check, study_crew
from avlprof.watch import Watch
from tests.fake_study import check_complete, command, work
from tests.helpers import ROOT
from tests.small_run import same_runs

pytestmark = pytest.mark.slow  # clusters and processes that load models
COMPARED = ComparisonSettings(samples=8, batch_size=2, max_new_tokens=3, baselines=(find_policy("h2o"),))
SECONDS = 240


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def task():
    return load_task("shapes")


@pytest.fixture(scope="module")
def head():
    """A Ray cluster of one node, for one actor."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'avlprof[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(head):
    """The cluster with a second node; gives what switches that one off, as a power cut does."""
    second = head.add_node(num_cpus=1)
    head.wait_for_nodes()
    there = [second]

    def switch_off():
        head.remove_node(there.pop(), allow_graceful=False)

    switch_off.address = head.address
    yield switch_off
    if there:
        switch_off()


@pytest.fixture
def submitit():
    pytest.importorskip("submitit", reason="needs submitit: pip install 'avlprof[submitit]'")


class Hand(Watch):
    """Holds who leads until two others have a task in hand; then calls `then`, once."""

    def __init__(self, folder, then, others=2):
        self._folder, self._then, self._others = folder, then, others
        self.called = False

    def phase(self, name, done, total):
        until = time.monotonic() + SECONDS
        while not self.called and list(self._folder.glob(".team/queue-*/todo/*")):
            assert time.monotonic() < until
            taken = {path.name.split(".")[1] for path in self._folder.glob(".team/queue-*/taken/*.w*")}
            if len(taken) == self._others:
                self.called = True
                self._then()
            time.sleep(0.01)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_no_cluster_is_an_error_in_one_sentence(tmp_path, monkeypatch, address):
    pytest.importorskip("ray", reason="needs Ray: pip install 'avlprof[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before, launch = signal.getsignal(signal.SIGTERM), Launch(2, "ray", {"address": address})
    with pytest.raises(UserError, match=f"no Ray cluster answers at '{address}'.*ray start --head"):
        Crew(launch, lambda n: ([], {}), tmp_path / "scratch").__enter__()
    assert signal.getsignal(signal.SIGTERM) is before


def ray_launch(nodes, workers=3):
    return Launch(workers, "ray", {"address": nodes.address})


def local_jobs(workers=3):
    return Launch(workers, "submitit", {"cluster": "local", "timeout_min": 10})


def compared(tiny, task, folder, launch, then):
    """A comparison by a launch, in the middle of which `then` is called with the store."""
    with SharedStore(folder, launch, ModelSpec(), TaskSpec()) as store:
        hand = Hand(folder, lambda: then(store))
        together = compare(tiny, task, [0.3], settings=COMPARED, store=store, watch=hand)
        names = store.team.crew.names
    assert hand.called
    return together, names


@pytest.fixture(scope="module")
def alone(tiny, task):
    return compare(tiny, task, [0.3], settings=COMPARED)


def test_a_comparison_on_two_nodes_of_which_one_is_lost(tmp_path, nodes, tiny, task, alone):
    before = []

    def power_cut(store):
        before.extend(store.team.crew.names)
        nodes()

    together, names = compared(tiny, task, tmp_path / "parts", ray_launch(nodes), power_cut)
    pd.testing.assert_frame_equal(together.answers, alone.answers, check_exact=True)
    assert together.strongest == alone.strongest
    assert len(set(names) & set(before)) == 1, "one worker was lost with its node, and replaced"


def test_a_trace_on_two_nodes_of_which_one_is_lost(tmp_path, nodes, tiny, task):
    plan = plan_trace(tiny, task, 12, TraceSettings(max_new_tokens=2), out=tmp_path / "together")
    words = ["trace", "--samples", "12", "--max-new-tokens", "2"]
    hand = Hand(plan.out, nodes)
    together = plan.lead(ray_launch(nodes), words, hand)
    assert hand.called
    same_runs(together.directory, replace(plan, out=tmp_path / "alone").run().directory)


def at_work(study, crew, count):
    """Waits until so many of a crew run a trial; the names of all."""
    until = time.monotonic() + SECONDS
    while True:
        crew_check(FolderStorage(crew.folder), crew)(study)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if len({name for name in crew.names for trial in running if runs(trial, name)}) >= count:
            return crew.names
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_study_on_two_nodes_of_which_one_is_lost(tmp_path, nodes):
    storage, trials, before = FolderStorage(tmp_path), 14, []

    def check(study):
        if not before:
            before.extend(at_work(study, crew, 2))
            nodes()
        crew_check(storage, crew)(study)

    with study_crew(storage, command(tmp_path, trials, 2.0), ray_launch(nodes)) as crew:
        crew.folder = tmp_path
        study = work(tmp_path, trials, 0.5, check=check)
    assert len(check_complete(study, trials)) == 1
    done = study.get_trials(states=(TrialState.COMPLETE,))
    assert any(runs(trial, name) for trial in done for name in before)


def test_a_worker_of_ray_says_why_it_cannot_work(tmp_path, head):
    launch = Launch(2, "ray", {"address": head.address})
    with Crew(launch, lambda n: (["-m", "avlprof", "trace", "-n", "x"], {}), tmp_path / "scratch") as crew:
        until = time.monotonic() + SECONDS
        while crew.started[0].code() is None and time.monotonic() < until:
            time.sleep(0.1)
        with pytest.raises(UserError, match=r"a worker stopped: .*--samples"):
            crew.check()


def test_a_comparison_by_jobs_of_which_one_is_killed(tmp_path, submitit, tiny, task, alone):
    before = []

    def kill(store):
        before.extend(store.team.crew.names)
        process = store.team.crew.started[0]._job._process
        with contextlib.suppress(ProcessLookupError):
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)

    together, names = compared(tiny, task, tmp_path / "parts", local_jobs(), kill)
    pd.testing.assert_frame_equal(together.answers, alone.answers, check_exact=True)
    assert [name in before for name in names] == [False, True]
    assert [path.name for path in (tmp_path / "parts" / ".team").iterdir()] == [".lock"]


def test_a_trace_by_jobs(tmp_path, submitit, tiny, task):
    plan = plan_trace(tiny, task, 6, TraceSettings(max_new_tokens=2), out=tmp_path / "together")
    words = ["trace", "--samples", "6", "--max-new-tokens", "2"]
    hand = Hand(plan.out, lambda: None, others=1)
    together = plan.lead(local_jobs(2), words, hand)
    assert hand.called
    same_runs(together.directory, replace(plan, out=tmp_path / "alone").run().directory)


def test_a_study_by_jobs(tmp_path, submitit):
    storage, trials, before = FolderStorage(tmp_path), 10, []

    def check(study):
        if not before:
            before.extend(at_work(study, crew, 1))
        crew_check(storage, crew)(study)

    with study_crew(storage, command(tmp_path, trials, 1.0), local_jobs(2)) as crew:
        crew.folder = tmp_path
        study = work(tmp_path, trials, 0.5, check=check)
    assert check_complete(study, trials) == []
    assert any(runs(trial, before[0]) for trial in study.trials)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cluster": "local", "gpus": 1}, "submitit refuses --launcher-args: Parameter 'gpus' need"),
        ({"cluster": "lsf"}, "submitit refuses --launcher-args: .*lsf"),
        ({"cluster": "local", "timeout_min": "long"}, 'Parameter "timeout_min" expected type'),
    ],
)
def test_parameters_that_submitit_does_not_know(tmp_path, submitit, arguments, said):
    with pytest.raises(UserError, match=said):
        Crew(Launch(2, "submitit", arguments), lambda n: ([], {}), tmp_path / "scratch").__enter__()


def children(process):
    """Processes that a process has started, those of its children included."""
    with open(f"/proc/{process}/task/{process}/children") as file:
        own = [int(child) for child in file.read().split()]
    return [each for child in own for each in (child, *children(child))]
