"""A run whose tables are not those of a run is refused when it is opened, in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import avlprof
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.runs import RunDirectory
from avlprof.runs.columns import SAMPLES, STATS
from tests.helpers import few

OLD = Path(__file__).parents[1] / "data" / "0.1.0" / "run"
LEVELS = ("coverage_90", "overlap_1")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def change(folder, kind, how):
    path = folder / f"{kind}-00000.parquet"
    table = pd.read_parquet(path)
    how(table).to_parquet(path, index=False)


def looks(folder):
    """Ways to open a run."""
    return (
        lambda: RunDirectory(folder).samples(),
        lambda: RunDirectory(folder).stats(),
        lambda: RunDirectory(folder).ids(),
        lambda: RunDirectory(folder).hash,
        lambda: Profile.of(RunDirectory(folder)),
        lambda: avlprof.Run.open(folder).profile(),
    )


def test_a_run_of_0_1_0_is_sound(folder):
    for look in looks(folder):
        look()


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("samples", name) for name in SAMPLES), *(("stats", name) for name in (*STATS, *LEVELS))],
)
def test_a_column_that_is_missing_is_named(folder, kind, name):
    change(folder, kind, lambda table: table.drop(columns=name))
    for look in looks(folder)[4:]:
        with pytest.raises(
            UserError, match=rf"{kind}-00000.parquet cannot be read: it has no column '{name}'"
        ):
            look()


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("samples", name) for name in SAMPLES), *(("stats", name) for name in (*STATS, *LEVELS))],
)
@pytest.mark.parametrize("value", few(["x", 1.5, b"\xff", [[1]], np.datetime64("2026-01-01"), None], 2))
def test_a_column_of_another_kind_is_named_or_read(folder, kind, name, value):
    change(folder, kind, lambda table: table.assign(**{name: [value] * len(table)}))
    for look in looks(folder)[:4]:
        try:
            look()
        except UserError as error:
            assert f"column '{name}' must hold" in str(error) and len(str(error)) < 400  # noqa: PT017


@pytest.mark.parametrize("kind", ["samples", "stats"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 400])
def test_a_table_that_is_none_is_named(folder, kind, content):
    (folder / f"{kind}-00000.parquet").write_bytes(content)
    for look in looks(folder):
        with pytest.raises(UserError, match=f"{kind}-00000.parquet cannot be read"):
            look()


def test_a_table_that_is_absent_is_named(folder):
    (folder / "stats-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"stats-00000\.parquet cannot be read"):
        RunDirectory(folder).samples()
