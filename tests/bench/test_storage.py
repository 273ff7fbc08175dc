"""Trials a second of a storage: as many trials as asked, by all workers at once, and nothing left behind."""

from __future__ import annotations

import io
import tempfile

import pandas as pd

from avlprof.bench.storage import run_storage_bench
from tests.cli_runner import invoke, refused
from tests.watching import Counted


def test_workers_that_sleep_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    counted = Counted()
    one, four = run_storage_bench([1, 4], None, 2, 0.2, counted)
    assert [(cost.storage, cost.workers, cost.trials) for cost in (one, four)] == [
        ("journal", 1, 2),
        ("journal", 4, 8),
    ]
    for cost in (one, four):
        assert cost.seconds > 0.4
        assert cost.per_second == cost.trials / cost.seconds
        assert abs(cost.share - 0.4 / cost.seconds) < 1e-9
        assert abs(cost.overhead - (cost.seconds - 0.4) / 2) < 1e-9
    assert four.seconds < 4 * one.seconds, "they sleep at the same time"
    assert counted.calls[-1] == (2, 2)
    assert list(tmp_path.iterdir()) == []


def test_the_command():
    words = ["bench", "storage", "--workers", "2", "--trials", "1", "--seconds", "0.01", "--format", "csv"]
    table = pd.read_csv(io.StringIO(invoke(*words).stdout))
    assert table[["storage", "workers", "trials"]].to_numpy().tolist() == [["journal", 2, 2]]
    assert "--workers must be whole numbers above 0" in refused(invoke("bench", "storage", "--workers", "0"))
