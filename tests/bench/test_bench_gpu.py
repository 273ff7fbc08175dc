"""The bench of a GPU, tried out on the CPU: what it measures and says, not how fast anything is."""

from __future__ import annotations

import math

import pytest
import torch

from avlprof.bench.gpu import SECOND_CALL, GpuBench, gpu_markdown, run_gpu_bench
from avlprof.bench.shapes import decoder_shape
from avlprof.errors import UserError
from tests.cli_runner import invoke
from tests.interpreted import DEVICE, passes, runs_elsewhere, runs_here

TINY = decoder_shape("tiny")


@pytest.mark.full
def test_every_part_is_measured():
    bench = GpuBench((TINY,), (200,), ((0, 1, 64),), layers=2, rounds=1, device="cpu", dtype=torch.float32)
    found = list(run_gpu_bench(bench))
    assert {cost.section for cost in found} == {"memory", "recording", "answers", "decoding"}
    assert all(math.isfinite(cost.value) and cost.value >= 0 for cost in found)
    measures = {cost.measure for cost in found}
    assert {"traced / plain", "traced all rows / plain", "traced / plain steps"} <= measures
    assert {"dense, captured: step", "keep .4, core .1, captured: refresh / step"} <= measures
    assert {"keep .2, captured, not fused: step", SECOND_CALL} <= measures
    page = gpu_markdown(found, "cpu").splitlines()
    assert len([line for line in page if line.startswith("|")]) == len(found) + 2


def test_time_that_is_over_leaves_parts_out():
    bench = GpuBench((TINY,), (200,), layers=2, device="cpu", dtype=torch.float32, seconds=-1)
    assert [cost.section for cost in run_gpu_bench(bench)] == ["memory"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_a_sentence():
    with pytest.raises(UserError, match="needs a CUDA device"):
        list(run_gpu_bench(GpuBench()))
    result = invoke("bench", "gpu")
    assert result.exit_code == 2
    assert "CUDA" in result.stderr


def once(device, work, times=1):
    """Run it, and say that it took a microsecond."""
    work()
    return 1e-6


@pytest.mark.full
@runs_elsewhere
def test_kernels_of_a_step_in_the_interpreter():
    passes(__file__, 1, "-k", "of_a_step_are")


@runs_here
def test_kernels_of_a_step_are_measured_beside_their_predictions(monkeypatch):
    from avlprof.bench import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "_BEYOND_CACHES", 1)
    if DEVICE == "cpu":  # the interpreter takes a tenth of a second a run
        monkeypatch.setattr(gpu_kernels, "elapsed", once)
    machine = gpu_kernels.Machine(torch.device(DEVICE), torch.float16, 3e12)
    found = list(gpu_kernels.decoding_kernels(TINY, 2, 64, machine))
    found += gpu_kernels.eviction_kernels(TINY, 160, machine)
    names = [cost.measure.split(" (")[0] for cost in found]
    assert names == [
        "decode",
        "stock attention with a mask",
        "stock / decode",
        "decode and weigh",
        "decode, vision in 4 bits",
        "choose and exchange",
        "order of a prompt",
        "take its tokens",
    ]
    assert all(math.isfinite(cost.value) and cost.value > 0 for cost in found)


def test_predictions_are_of_bytes_products_and_launches():
    from avlprof.attention.column_sums import Work
    from avlprof.bench.gpu_kernels import Machine

    machine = Machine(torch.device("cpu"), torch.bfloat16, 2e12)
    assert machine.microseconds(Work(2e6, 0)) == pytest.approx(1 + 5)
    assert machine.microseconds(Work(0, 790e12), 2) == pytest.approx(1e6 + 10)
