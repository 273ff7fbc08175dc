"""Several processes that trace into one run directory, started by torchrun, by SLURM, or again."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avlprof.errors import UserError
from avlprof.runs import RunDirectory, RunWriter, Shard
from avlprof.tasks import load_task
from avlprof.tracing import trace_samples
from avlprof.tracing.options import TraceSettings
from avlprof.watch import SILENT
from tests.small_run import META, files, sample
from tests.watching import Counts

SAMPLES, TOKENS = 8, 4
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def task():
    return load_task("shapes")


def traced(loaded, task, out, shard=None, count=SAMPLES, batch_size=1, watch=SILENT):
    samples = task.samples("search", count)
    return trace_samples(
        loaded,
        task,
        samples,
        Path(out),
        TraceSettings(split="search", max_new_tokens=TOKENS, batch_size=batch_size),
        shard=shard,
        watch=watch,
    )


@pytest.fixture(scope="module")
def whole(tiny, task, tmp_path_factory):
    """What one process gives."""
    return traced(tiny, task, tmp_path_factory.mktemp("one") / "run")


def assert_same_run(one: RunDirectory, other: RunDirectory):
    keys = ["sample", "layer", "head", "phase", "query"]
    assert sorted(one.samples()["sample"]) == sorted(other.samples()["sample"])
    assert one.hash == other.hash
    left, right = (run.stats().set_index(keys).sort_index() for run in (one, other))
    assert left.index.equals(right.index)
    np.testing.assert_allclose(*(np.stack(frame.pop("distance")) for frame in (left, right)), atol=1e-5)
    np.testing.assert_allclose(left.to_numpy(float), right.to_numpy(float), atol=1e-5)
    for name in one.ids():
        for kind, scores in one.scores(name).items():
            np.testing.assert_allclose(other.scores(name)[kind], scores, atol=1e-5)


# --- shares


def test_shares_are_disjoint_and_together_whole():
    rng = np.random.default_rng(0)
    for _ in range(50):
        items, count = list(range(rng.integers(0, 40))), int(rng.integers(1, 9))
        shares = [Shard(index, count).of(items) for index in range(count)]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert len({Shard(index, count).prefix for index in range(count)}) == count


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "5", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, Shard()),
        (TORCHRUN, Shard(3, 4, 1)),
        (SRUN, Shard(2, 5, 2)),
        (SRUN | {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}, Shard(2, 5, 2)),
        (SRUN | {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}, Shard()),
        (SRUN | TORCHRUN, Shard(3, 4, 1)),
        ({"RANK": "1"}, Shard()),
    ],
)
def test_which_process_this_is(environment, want):
    assert Shard.from_environment(environment) == want


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (TORCHRUN | {"RANK": "4"}, "got process 4 of 4"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "of 0"),
        (SRUN | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS must be a whole number, got 'two'"),
    ],
)
def test_nonsense_in_the_environment_is_refused(environment, said):
    with pytest.raises(UserError, match=said):
        Shard.from_environment(environment)


# --- two processes


@pytest.mark.slow  # torchrun starts two processes, which import and load all anew
def test_two_processes_of_torchrun_give_the_run_of_one(tmp_path, whole):
    """Through the command line: one table, one progress, and a directory like that of one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command = ["-m", "avlprof", "trace", "-n", SAMPLES, "--max-new-tokens", TOKENS, "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        [*launcher, *map(str, command), "--out", str(tmp_path / "run"), "--format", "csv"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, "a header and one row"
    assert f"{SAMPLES} samples by 2 processes to" in done.stderr
    assert "process 2 of 2 has finished; " in done.stderr
    assert done.stderr.count("samples/s") == 1
    assert f"next: avlprof analyze {tmp_path / 'run'}" in done.stderr
    run = RunDirectory(tmp_path / "run")
    assert {part.split("-")[0] for part in run.parts()} == {"p0", "p1"}
    assert_same_run(whole, run)


def _of_slurm(environment, loaded, task, out, start):
    start.wait()
    traced(loaded, task, out, Shard.from_environment(environment), batch_size=2)


@pytest.mark.full  # processes of their own
def test_two_processes_of_slurm_at_the_same_time(tmp_path, tiny, task, whole):
    start = FORK.Barrier(2)
    base = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0"}
    processes = [
        FORK.Process(
            target=_of_slurm,
            args=(base | {"SLURM_PROCID": str(i)}, tiny, task, str(tmp_path / "run"), start),
        )
        for i in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    run = RunDirectory(tmp_path / "run")
    assert len(run.samples()) == SAMPLES
    assert not [name for name in files(tmp_path / "run") if name.startswith(".")]
    assert_same_run(whole, run)


def test_another_number_of_processes_resumes_without_loss_or_doubles(tmp_path, tiny, task, whole):
    for shard, count in ((Shard(1, 2), 5), (None, 2), (Shard(2, 3), SAMPLES), (Shard(0, 3), SAMPLES)):
        traced(tiny, task, tmp_path, shard, count)
    assert 0 < len(RunDirectory(tmp_path).samples()) < SAMPLES
    calls = []
    traced(tiny, task, tmp_path, Shard(1, 3), watch=Counts(lambda *counts: calls.append(counts)))
    assert calls[-1] == (3, 3)
    assert calls[0][0] > 0, "some of its share was done by others"
    run = RunDirectory(tmp_path)
    assert sorted(run.samples()["sample"]) == sorted(s.id for s in task.samples("search", SAMPLES))
    assert_same_run(whole, run)


# --- who may write


def opened(path, index, count, meta=META):
    shard = Shard(index, count)
    return RunWriter(path, meta, shard.prefix, shard.count)


def test_processes_of_one_launch_share_a_directory_and_no_others(tmp_path):
    first, second = opened(tmp_path, 0, 2), opened(tmp_path, 1, 2)
    for index, count in ((0, 2), (2, 3), (0, 1)):
        with pytest.raises(UserError, match="another process is writing to"):
            opened(tmp_path, index, count)
    first.close()
    with pytest.raises(UserError, match="another process"):
        opened(tmp_path, 2, 3)
    opened(tmp_path, 0, 2).close()
    second.close()
    alone = opened(tmp_path, 0, 1)
    with pytest.raises(UserError, match="another process"):
        opened(tmp_path, 1, 3)
    alone.close()
    others = [opened(tmp_path, index, 3) for index in range(3)]
    for number, writer in enumerate(others):
        writer.add(*sample(f"s{number}"))
        writer.flush()
        writer.close()
    assert sorted(RunDirectory(tmp_path).ids()) == ["s0", "s1", "s2"]


def _begin(path, index, count, layers, start, said):
    start.wait()
    try:
        meta = META.model_copy(update={"layers": layers, "created": "x" * index})
        writer = opened(Path(path), index, count, meta)
    except UserError as error:
        said.put(str(error))
    else:
        writer.add(*sample(f"s{index}"))
        writer.flush()
        said.put(layers)


@pytest.mark.slow  # four processes each
@pytest.mark.parametrize("odd", [False, True])
def test_processes_that_begin_at_once_agree_on_the_settings(tmp_path, odd):
    """The first one's settings stand; a process with others is told what differs."""
    for attempt in range(4):
        start, said, count = FORK.Barrier(6), FORK.Queue(), 6
        path = tmp_path / str(attempt)
        processes = [
            FORK.Process(target=_begin, args=(str(path), i, count, 2 + (odd and i % 2), start, said))
            for i in range(count)
        ]
        for process in processes:
            process.start()
        results = [said.get(timeout=30) for _ in processes]
        for process in processes:
            process.join(30)
        layers = RunDirectory(path).meta.layers
        agreed = [one for one in results if one == layers]
        refused = [one for one in results if isinstance(one, str)]
        assert len(agreed) == (3 if odd else 6)
        assert len(agreed) + len(refused) == count
        assert all("layers: " in sentence for sentence in refused)
        assert len(RunDirectory(path).ids()) == len(agreed)
        assert not [name for name in files(path) if "partial" in name]
