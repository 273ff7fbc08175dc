"""Overlap of the sets of single heads, against plain sets of Python."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from typer.testing import CliRunner

from avlprof.analysis import Profile, findings
from avlprof.analysis.heads import head_overlap
from avlprof.analysis.statistics import FRAMES
from avlprof.cli._app import app
from avlprof.errors import UserError
from avlprof.runs import RunDirectory
from tests.synthetic_run import HEADS, LAYERS, write_run

VISION = (23, 0, 40, 17, 31)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_run(tmp_path_factory.mktemp("run") / "run", VISION, per_head=True)


@pytest.fixture(scope="module")
def profile(run: RunDirectory) -> Profile:
    return Profile.from_run(run)


def best(row: np.ndarray, share: float) -> set[int] | None:
    """Places of the best share of a row, ties to the lower place; None for a row of nothing."""
    if not row.any():
        return None
    count = max(int(share * len(row) + 1e-6), 1)
    return set(sorted(range(len(row)), key=lambda place: (-row[place], place))[:count])


def mean_overlap(pairs: list[tuple[np.ndarray, np.ndarray]], share: float) -> float:
    """Mean share of the first row's set that is in the second's; NaN without a pair that has both."""
    found = []
    for a, b in pairs:
        one, other = best(a, share), best(b, share)
        if one is not None and other is not None:
            found.append(len(one & other) / len(one))
    return sum(found) / len(found) if found else float("nan")


def test_overlaps_are_those_of_sets() -> None:
    rng = np.random.default_rng(4)
    for rows, layers, heads, count, share in ((1, 1, 1, 1, 0.1), (3, 2, 4, 9, 0.3), (2, 3, 2, 50, 0.1)):
        scores = rng.integers(0, 5, size=(rows, layers, heads, count)).astype(np.float32)  # with ties
        scores[0, 0, 0] = 0.0
        shared = scores.mean(axis=2)
        within, across = head_overlap(scores, shared, share)
        assert within.shape == (layers, heads, heads)
        assert across.shape == (layers, heads, layers)
        for layer, head in itertools.product(range(layers), range(heads)):
            own = scores[:, layer, head]
            for other in range(heads):
                wanted = mean_overlap(list(zip(own, scores[:, layer, other], strict=True)), share)
                assert within[layer, head, other] == pytest.approx(wanted, nan_ok=True)
            for other in range(layers):
                wanted = mean_overlap(list(zip(own, shared[:, other], strict=True)), share)
                assert across[layer, head, other] == pytest.approx(wanted, nan_ok=True)


def test_the_frame_is_the_mean_over_samples(run: RunDirectory, profile: Profile) -> None:
    table = profile["head_overlap"].set_index(["layer_a", "head_a", "layer_b", "head_b", "query"])
    assert table.index.is_unique
    scores = {name: run.scores(name) for name, count in zip(run.ids(), VISION, strict=True) if count}
    checked = 0
    for query, name in (("last", "last"), ("step", "decode")):
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            within = [(layer, other) for other in range(HEADS)]
            for place in [*within, *((other, -1) for other in range(LAYERS))]:
                values = []
                for own in scores.values():
                    rows, shared = own[f"{name}_heads"], own[name]
                    if query == "last":
                        rows, shared = rows[None], shared[None]
                    theirs = shared[:, place[0]] if place[1] < 0 else rows[:, place[0], place[1]]
                    pairs = list(zip(rows[:, layer, head], theirs, strict=True))
                    values.append(mean_overlap(pairs, run.meta.top_share))
                known = [value for value in values if not np.isnan(value)]
                key = (layer, head, *place, query)
                if not known:
                    assert key not in table.index
                    continue
                low, high = scipy.stats.t.interval(
                    0.95, len(known) - 1, loc=np.mean(known), scale=max(scipy.stats.sem(known), 1e-300)
                )
                wanted = [np.mean(known), low, high, len(known)]
                np.testing.assert_allclose(table.loc[key], wanted, rtol=1e-6, atol=1e-9)
                checked += 1
    assert checked == len(table)
    assert (2, 1, 2, 0, "last") not in table.index, "head 1 of layer 2 never looks at vision"
    assert table.loc[(3, 0, 3, -1, "last"), "n"] == 3, "layer 3 of s0 never looks at vision"


def test_a_finding_says_what_heads_share(run: RunDirectory, profile: Profile) -> None:
    table = profile["head_overlap"]
    common, shared = [], []
    for row in table.itertuples():
        if row.query == "step" and row.layer_a == row.layer_b:
            if row.head_b < 0:
                shared.append(row.mean)
            elif row.head_a != row.head_b:
                common.append(row.mean)
    sentence = next(text for text in findings(profile) if text.startswith("Two heads of a layer"))
    assert f"have {100 * np.mean(common):.0f}% of their top 10%" in sentence
    assert f"holds {100 * np.mean(shared):.0f}% of a head's own" in sentence
    averaged = write_run(run.path.parent / "averaged", VISION, averaged=True)
    assert not any(text.startswith("Two heads") for text in findings(Profile.from_run(averaged)))


def test_other_frames_are_those_of_a_run_of_head_averages(profile: Profile, tmp_path: Path) -> None:
    averaged = Profile.from_run(write_run(tmp_path / "run", VISION, averaged=True))
    for name in set(FRAMES) - {"heads", "head_overlap"}:
        pd.testing.assert_frame_equal(averaged.frames[name], profile.frames[name], rtol=1e-5, atol=1e-8)
    assert averaged.frames["head_overlap"].empty
    with pytest.raises(UserError, match="holds averages over heads only; trace with per_head"):
        averaged["head_overlap"]
    loaded = Profile.load(averaged.save(tmp_path / "profile"))
    assert list(loaded.frames["head_overlap"].columns) == list(profile["head_overlap"].columns)


def test_a_run_without_pictures_has_no_sets(tmp_path: Path) -> None:
    profile = Profile.from_run(write_run(tmp_path / "run", (0, 0), per_head=True))
    assert profile["head_overlap"].empty
    heads = profile["heads"]
    assert "vision" in set(heads["statistic"])
    assert not heads["statistic"].str.startswith("coverage").any()


def test_the_table_is_printed(run: RunDirectory) -> None:
    words = ["analyze", str(run.path), "--what", "head_overlap", "--format", "csv"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "layer_a,head_a,layer_b,head_b,query,mean,low,high,n"
    assert len(lines) == len(Profile.from_run(run)["head_overlap"]) + 1
