from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from avlprof.analysis import Profile
from avlprof.analysis.coverage import as_shares, mass_curves, share_grid
from avlprof.analysis.intervals import Moments, over_samples
from avlprof.analysis.scan import layer_overlap
from avlprof.analysis.statistics import FRAMES, PER_HEAD, VIEWS
from avlprof.analysis.tables import refresh_from_drift
from avlprof.errors import UserError
from avlprof.policy import PromptShape
from avlprof.runs import RunDirectory, RunWriter
from tests.synthetic_run import LAYERS, MODALITIES, STEPS, settings, write_run
from tests.watching import Counted

VISION = (23, 40, 17, 40, 31)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_run(tmp_path_factory.mktemp("run") / "run", VISION)


@pytest.fixture(scope="module")
def profile(run: RunDirectory) -> Profile:
    return Profile.from_run(run)


def interval(values: list[float]) -> tuple[float, float, float, int]:
    """Plain mean and t-interval of the values of samples."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, np.nan, np.nan, len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
    return mean, mean - half, mean + half, len(values)


def matches(row: pd.Series, values: list[float]) -> bool:
    found = [row["mean"], row["low"], row["high"], row["n"]]
    return bool(np.allclose(found, interval(values), rtol=1e-6, atol=1e-9, equal_nan=True))


def of_heads(run: RunDirectory, column: str, layer: int, phase: str, query: str) -> dict[str, float]:
    """Head mean of a column by sample, by a loop over the raw rows."""
    rows = run.stats()
    found: dict[str, list[float]] = {}
    for row in rows.itertuples():
        if (row.layer, row.phase, row.query) == (layer, phase, query):
            found.setdefault(row.sample, []).append(getattr(row, column))
    return {sample: sum(values) / len(values) for sample, values in found.items()}


def one(table: pd.DataFrame, **where: object) -> pd.Series:
    for key, value in where.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_intervals_leave_out_what_was_not_observed() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 3, 2))
    values[rng.uniform(size=values.shape) < 0.4] = np.nan
    values[:, 2, 1] = np.nan
    moments = Moments((3, 2))
    for sample in values:
        moments.add(sample)
    table = moments.table({"a": list("xyz"), "b": (0, 1)})
    long = pd.DataFrame(
        [{"a": "xyz"[i], "b": j, "v": values[s, i, j]} for s in range(7) for i in range(3) for j in range(2)]
    )
    pd.testing.assert_frame_equal(table, over_samples(long, ["a", "b"], "v"), check_dtype=False)
    for row in table.to_dict("records"):
        seen = values[:, "xyz".index(row["a"]), row["b"]]
        assert matches(pd.Series(row), list(seen[~np.isnan(seen)]))
    assert len(table) == 5


def test_one_sample_has_a_mean_and_no_interval(tmp_path: Path) -> None:
    profile = Profile.from_run(write_run(tmp_path / "one", (12,)))
    row = profile["entropy"].iloc[0]
    assert np.isfinite(row["mean"])
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])
    assert row["n"] == 1


def test_mass_and_entropy_are_means_over_heads_then_samples(run: RunDirectory, profile: Profile) -> None:
    mass, entropy = profile["mass"], profile["entropy"]
    for layer in range(LAYERS):
        for phase, query in (("prefill", "system"), ("prefill", "last"), ("decode", "generated")):
            place = {"layer": layer, "phase": phase, "query": query}
            for name in MODALITIES:
                values = of_heads(run, f"mass_{name}", **place)
                assert matches(one(mass, modality=name, **place), list(values.values()))
            assert matches(one(entropy, **place), list(of_heads(run, "entropy", **place).values()))
    sums = mass.groupby(["layer", "phase", "query"])["mean"].sum()
    assert np.allclose(sums, 1)
    assert len(sums) == LAYERS * 5


def test_coverage_is_a_share_of_each_samples_own_vision_tokens(run: RunDirectory, profile: Profile) -> None:
    counts = dict(zip((f"s{i}" for i in range(len(VISION))), VISION, strict=True))
    for level in (50, 99):
        place = {"layer": 1, "phase": "decode", "query": "generated"}
        values = of_heads(run, f"coverage_{level}", **place)
        row = one(profile["coverage"], level=level, **place)
        assert matches(row, [values[s] / counts[s] for s in values])
        assert row["tokens"] == pytest.approx(np.mean(list(values.values())))


def plain_curve(scores: list[float], share: float) -> float:
    """Mass of the best `share` of tokens, the last one in part; 1 when there is nothing to cover."""
    if sum(scores) == 0:
        return 1.0
    left, held = share * len(scores), 0.0
    for score in sorted(scores, reverse=True):
        held += score * min(left, 1.0)
        left = max(left - 1.0, 0.0)
    return held / sum(scores)


def test_coverage_curves_over_ragged_samples(run: RunDirectory, profile: Profile) -> None:
    curves = profile["coverage_curve"]
    assert not curves["mean"].isna().any()
    grid = sorted(curves["share_kept"].unique())
    assert len(grid) == 40
    for layer in (0, 3):
        for share in (grid[0], grid[10], grid[-1]):
            last, instruction, step, answer = [], [], [], []
            for i in range(len(VISION)):
                scores = {k: v.astype(float) for k, v in run.scores(f"s{i}").items()}
                last.append(plain_curve(list(scores["last"][layer]), share))
                if scores["instruction"].any():
                    instruction.append(plain_curve(list(scores["instruction"][layer]), share))
                rows = [row[layer] for row in scores["decode"]]
                step.append(np.mean([plain_curve(list(row), share) for row in rows]))
                together = [sum(float(row[token]) for row in rows) for token in range(len(rows[0]))]
                answer.append(plain_curve(together, share))
                # each step by itself needs no more, weighed by how much it looks at the picture
                looks = sum(row.sum() * plain_curve(list(row), share) for row in rows)
                assert looks >= answer[-1] * sum(together) - 1e-9
            wanted = {"last": last, "instruction": instruction, "step": step, "answer": answer}
            for query, values in wanted.items():
                assert matches(one(curves, layer=layer, query=query, share_kept=share), values), query
    assert (curves["n"] == np.where(curves["query"] == "instruction", 4, 5)).all()


def test_a_profile_of_another_arithmetic_is_made_anew(run: RunDirectory, profile: Profile) -> None:
    """0.1.0 saved curves of `answer` that added shares of steps in place of weights."""
    folder = run.path / "profile"
    profile.save(folder)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["schema_"] == "avlprof.profile/2"
    (folder / "meta.json").write_text(json.dumps(meta | {"schema_": "avlprof.profile/1"}))
    old = profile["coverage_curve"].assign(mean=0.0)
    old.to_parquet(folder / "coverage_curve.parquet", index=False)
    with pytest.raises(UserError, match="analyze again"):
        Profile.load(folder)
    assert Profile.of(run)["coverage_curve"].equals(profile["coverage_curve"])
    assert Profile.load(folder)["coverage_curve"].equals(profile["coverage_curve"])


def test_curves_rise_to_one(profile: Profile) -> None:
    curves = profile["coverage_curve"]
    table = curves.pivot(index=["query", "layer"], columns="share_kept", values="mean")
    assert (np.diff(table.to_numpy(), axis=1) >= -1e-12).all()
    assert np.allclose(table.to_numpy()[:, -1], 1)


def test_a_long_grid_is_fine_where_curves_are_steep() -> None:
    for most in (1, 2, 256, 257, 2880, 16000):
        grid = share_grid(most)
        assert grid[0] == 1 / most
        assert grid[-1] == 1.0
        assert (np.diff(grid) > 0).all()
        assert np.diff(grid, prepend=0).max() <= max(0.0101, 1 / most + 1e-12) + 1 / most
        assert len(grid) <= max(256, 200)


def test_layer_overlap_counts_common_tokens() -> None:
    rng = np.random.default_rng(2)
    for count, share in ((1, 0.1), (9, 0.1), (33, 0.25)):
        scores = rng.integers(0, 6, size=(4, 3, count)).astype(float) + 0.01
        scores[:, 2] = 0.0
        scores[0, 1] = 0.0
        size = max(1, int(share * count + 1e-6))
        found = layer_overlap(as_shares(scores), share)
        for a in range(3):
            for b in range(3):
                overlaps = []
                for row in scores:
                    if row[a].any() and row[b].any():
                        sets = [set(sorted(range(count), key=lambda k: -row[i][k])[:size]) for i in (a, b)]
                        overlaps.append(len(sets[0] & sets[1]) / size)
                wanted = np.mean(overlaps) if overlaps else np.nan
                assert found[a, b] == pytest.approx(wanted, nan_ok=True)


def test_overlap_of_layers_is_symmetric_and_whole_with_itself(run: RunDirectory, profile: Profile) -> None:
    overlap = profile["overlap"]
    for query in ("last", "step"):
        table = overlap[overlap["query"] == query].pivot(index="layer_a", columns="layer_b", values="mean")
        assert np.allclose(table, table.T)
        assert np.allclose(np.diag(table), 1)
    assert one(overlap, layer_a=3, layer_b=0, query="last")["n"] == 4, "layer 3 of s0 sees no vision"
    assert one(overlap, layer_a=1, layer_b=0, query="last")["n"] == 5
    values = []
    for i in range(len(VISION)):
        shares = as_shares(run.scores(f"s{i}")["last"][None])
        values.append(float(layer_overlap(shares, run.meta.top_share)[0, 1]))
    assert matches(one(overlap, layer_a=0, layer_b=1, query="last"), values)


def test_drift_by_lag(run: RunDirectory, profile: Profile) -> None:
    drift = profile["drift"]
    assert sorted(drift["lag"].unique()) == [1, 2, 4, 8]
    for lag in (1, 8):
        values = of_heads(run, f"overlap_{lag}", 2, "decode", "generated")
        assert matches(one(drift, layer=2, lag=lag), list(values.values()))


@pytest.mark.parametrize(
    ("overlaps", "interval"),
    [
        ({1: 0.9, 2: 0.8, 4: 0.7, 8: 0.55, 16: 0.4, 32: 0.6}, 8),
        ({1: 0.9, 2: 0.8, 4: 0.3}, 4),
        ({1: 0.3, 2: 0.2}, 4),
        ({1: 0.9, 2: 0.9, 4: 0.9, 8: 0.9, 16: 0.9, 32: 0.9}, 32),
        ({}, 8),
    ],
)
def test_refresh_interval_from_drift(overlaps: dict[int, float], interval: int) -> None:
    rows = [
        {"layer": layer, "lag": lag, "mean": mean + wobble, "low": 0.0, "high": 1.0, "n": 3}
        for lag, mean in overlaps.items()
        for layer, wobble in ((0, 0.02), (1, -0.02))
    ]
    assert (
        refresh_from_drift(pd.DataFrame(rows, columns=["layer", "lag", "mean", "low", "high", "n"]))
        == interval
    )


def text_masses(run: RunDirectory, layer: int, query: str) -> list[list[float]]:
    """Head mean of the distance histogram, one list a sample."""
    rows = run.stats().query("layer == @layer and query == @query")
    return [list(np.mean(list(group["distance"]), axis=0)) for _, group in rows.groupby("sample")]


def test_windows_hold_their_share_of_text(run: RunDirectory, profile: Profile) -> None:
    # text 6..8 and at most STEPS + 1 generated tokens: the histogram's bins end at 18
    longest = max(6 + i % 3 + STEPS - i + 1 for i in range(len(VISION)))
    edges = [1, 2, 4, 8, 16, longest]
    window, curve = profile["window"], profile["window_curve"]
    assert sorted(curve["distance"].unique()) == edges
    for layer in (0, 2):
        for phase, query in (("decode", "generated"), ("prefill", "last")):
            masses = text_masses(run, layer, query)
            for i, edge in enumerate(edges):
                held = [sum(m[: i + 1]) / sum(m) if edge < longest else 1.0 for m in masses]
                assert matches(one(curve, layer=layer, phase=phase, query=query, distance=edge), held)
            for level in (50, 95):
                firsts = []
                for m in masses:
                    cumulative = [*(sum(m[: i + 1]) / sum(m) for i in range(5)), 1.0]
                    firsts.append(
                        float(next(e for e, c in zip(edges, cumulative, strict=True) if c >= level / 100))
                    )
                assert matches(one(window, layer=layer, phase=phase, query=query, level=level), firsts)
    assert set(window["query"]) == {"text", "last", "generated"}


def test_prompts_and_answer_length(profile: Profile) -> None:
    assert profile.prompts() == [PromptShape(3 + i, n, 6 + i % 3, group=8) for i, n in enumerate(VISION)]
    assert profile.answer_tokens == STEPS - 2
    assert profile.layers == LAYERS


def test_evidence_is_the_need_of_prompt_and_answer(profile: Profile) -> None:
    store, compute = profile.evidence("store"), profile.evidence("compute")
    curves = profile["coverage_curve"].pivot(index=["query", "layer"], columns="share_kept", values="mean")
    assert store.coverage is not None
    assert compute.coverage is not None
    assert store.tokens == 40
    assert np.allclose(store.coverage, np.minimum(curves.loc["last"], curves.loc["answer"]))
    assert np.allclose(compute.coverage, curves.loc["step"])
    mass, spread = profile["mass"].query("modality == 'vision'"), profile["concentration"]
    for evidence, traced, scored in ((store, "text", "instruction"), (compute, "generated", "step")):
        assert evidence.vision_mass is not None
        assert np.allclose(evidence.vision_mass, mass[mass["query"] == traced]["mean"])
        for name in ("sparsity", "entropy", "skewness"):
            wanted = spread[(spread["query"] == scored) & (spread["statistic"] == name)].sort_values("layer")
            assert np.allclose(getattr(evidence, name), wanted["mean"])


def test_per_layer_table(profile: Profile) -> None:
    table = profile.per_layer()
    assert list(table["layer"]) == list(range(LAYERS))
    assert not table.isna().any(axis=None)
    assert table["coverage_90"][2] == one(profile["coverage"], layer=2, query="generated", level=90)["mean"]
    assert table["overlap_8"][1] == one(profile["drift"], layer=1, lag=8)["mean"]
    assert table["window_95"][0] == one(profile["window"], layer=0, query="generated", level=95)["mean"]


def test_a_run_without_decoding(tmp_path: Path) -> None:
    profile = Profile.from_run(write_run(tmp_path / "run", (9, 14), decode=False))
    table = profile.per_layer()
    assert table[["vision_decode", "overlap_8"]].isna().all(axis=None)
    assert not table[["vision_last", "coverage_90", "window_95", "entropy"]].isna().any(axis=None)
    assert profile.answer_tokens == 1
    assert profile["drift"].empty
    assert set(profile["coverage_curve"]["query"]) == {"last", "instruction"}
    store, compute = profile.evidence("store").coverage, profile.evidence("compute").coverage
    assert store is not None
    assert np.array_equal(store, compute)
    for name in ("vision_mass", "entropy", "sparsity", "skewness"):
        ours, theirs = (getattr(profile.evidence(use), name) for use in ("store", "compute"))
        assert np.array_equal(ours, theirs)


def test_a_run_without_pictures(tmp_path: Path) -> None:
    profile = Profile.from_run(write_run(tmp_path / "run", (0, 0)))
    assert profile["coverage_curve"].empty
    assert not profile["mass"].empty
    with pytest.raises(UserError, match="no vision tokens"):
        profile.evidence()


def test_samples_without_pictures_do_not_count_in_shares(tmp_path: Path) -> None:
    profile = Profile.from_run(write_run(tmp_path / "run", (20, 0, 13, 0)))
    assert (profile["coverage_curve"]["n"] <= 2).all()
    assert (profile["coverage"]["n"] == 2).all()
    assert not profile["coverage"]["mean"].isna().any()
    assert (profile["mass"]["n"] == 4).all()


def test_saved_and_loaded_alike(profile: Profile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "profile")
    again = Profile.load(path)
    assert again.meta == profile.meta
    assert set(profile.frames) == set(FRAMES)
    for name in FRAMES:
        pd.testing.assert_frame_equal(again.frames[name], profile.frames[name])
    assert not list(path.glob(".*partial"))


def test_a_table_is_a_copy_and_an_unknown_name_has_neighbours(profile: Profile) -> None:
    table = profile["drift"]
    pd.testing.assert_frame_equal(table, profile.frames["drift"])
    table["mean"] = 0.0
    assert profile.frames["drift"]["mean"].any()
    pd.testing.assert_frame_equal(profile["per_layer"], profile.per_layer())
    pd.testing.assert_frame_equal(profile["horizon"], profile.horizon())
    for name in VIEWS:
        if name not in PER_HEAD:
            assert len(profile[name]), name
    with pytest.raises(UserError, match="unknown table 'drfit'; did you mean drift"):
        profile["drfit"]


def test_a_saved_profile_serves_until_the_run_grows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", (12, 15, 18))
    first = Profile.of(run)
    watch = Counted()
    Profile.of(RunDirectory(run.path), watch)
    assert not watch.calls
    source = write_run(tmp_path / "other", (12, 15, 18, 21), parts=4)
    for file in source.path.glob("*-00003.*"):
        shutil.copy(file, run.path / file.name)
    grown = Profile.of(RunDirectory(run.path), watch)
    assert watch.calls == [(i, 4) for i in range(1, 5)]
    assert grown.meta.samples == 4
    assert grown.meta.run_hash != first.meta.run_hash
    assert Profile.load(run.path / "profile").meta == grown.meta


def test_what_is_no_profile_is_refused_in_one_sentence(
    run: RunDirectory, profile: Profile, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not a profile; make one with 'avlprof analyze RUN'"):
        Profile.load(tmp_path)
    path = profile.save(tmp_path / "bad")
    (path / "mass.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        Profile.load(path)
    RunWriter(tmp_path / "empty", settings())
    with pytest.raises(UserError, match="no finished sample"):
        Profile.from_run(RunDirectory(tmp_path / "empty"))


def test_mass_curves_of_a_row_without_mass_are_full() -> None:
    curves = mass_curves(
        as_shares(np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])), np.array([0.25, 1 / 3, 0.5, 1.0])
    )
    assert np.allclose(curves, [[1, 1, 1, 1], [0.375, 0.5, 0.75, 1]])


def test_learned_sinks_are_a_part_of_the_mass(run: RunDirectory, tmp_path: Path) -> None:
    """Three quarters of every row go to the model's own sinks; means of a row still sum to 1."""
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    for part in folder.glob("stats-*.parquet"):
        stats = pd.read_parquet(part)
        masses = [f"mass_{name}" for name in MODALITIES]
        stats[masses] *= 0.25
        stats.assign(mass_learned_sink=0.75).to_parquet(part, index=False)
    plain, sunk = Profile.from_run(run), Profile.from_run(RunDirectory(folder))
    assert set(sunk["mass"]["modality"]) == {*MODALITIES, "learned_sink"}
    assert set(plain["mass"]["modality"]) == set(MODALITIES)
    keys = ["layer", "phase", "query"]
    np.testing.assert_allclose(sunk["mass"].groupby(keys)["mean"].sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(sunk["mass"].query("modality == 'learned_sink'")["mean"], 0.75)
    np.testing.assert_allclose(sunk["heads"].query("statistic == 'learned_sink'")["mean"], 0.75)
    assert (sunk["by_sample"]["mass_learned_sink"] == 0.75).all()
