"""Horizon, sinks, heads, concentration, text windows, differences and findings of a profile."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from typer.testing import CliRunner

from avlprof.allocators import ALLOCATORS
from avlprof.analysis import Profile, findings
from avlprof.analysis.horizon import horizon
from avlprof.analysis.scan import STATISTICS, concentration
from avlprof.analysis.tables import head_mean
from avlprof.analysis.window import reach, smallest_windows, window_curve, windows_for
from avlprof.cli._app import app
from avlprof.cli.analyze import VIEWS
from avlprof.errors import UserError
from avlprof.runs import RunDirectory
from tests.synthetic_run import HEADS, LAYERS, write_run

VISION = (23, 40, 17, 0, 31, 40, 12, 9, 26)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_run(tmp_path_factory.mktemp("run") / "run", VISION, per_head=True)


@pytest.fixture(scope="module")
def profile(run: RunDirectory) -> Profile:
    return Profile.from_run(run)


def one(table: pd.DataFrame, **where: object) -> pd.Series:
    for key, value in where.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


# head averages and heads -----------------------------------------------------------------------


def test_a_run_of_head_averages_has_the_profile_of_its_heads(profile: Profile, tmp_path: Path) -> None:
    averaged = Profile.from_run(write_run(tmp_path / "run", VISION, averaged=True))
    for name, table in profile.frames.items():
        if name not in ("heads", "head_overlap"):
            pd.testing.assert_frame_equal(averaged.frames[name], table, rtol=1e-5, atol=1e-8)
    with pytest.raises(UserError, match="holds averages over heads only; trace with per_head"):
        averaged["heads"]


def test_heads_are_counted_one_by_one(run: RunDirectory, profile: Profile) -> None:
    stats, heads = run.stats(), profile["heads"]
    levels, lags = len(run.meta.coverages), len(run.meta.lags)
    assert len(heads) == LAYERS * HEADS * (5 * (7 + levels) + lags)
    counts = dict(zip((f"s{i}" for i in range(len(VISION))), VISION, strict=True))
    names = {"mass_vision": "vision", "mass_text": "text", "mass_sink": "sink", "text_sink": "text_sink"}
    names |= {name: name for name in ("entropy", "coverage_90", "overlap_4")}
    for layer, head, query in ((0, 1, "generated"), (3, 0, "last"), (2, 1, "vision")):
        ours = stats[(stats["layer"] == layer) & (stats["head"] == head) & (stats["query"] == query)]
        for column, statistic in names.items():
            if column == "overlap_4" and query != "generated":
                assert heads[(heads["query"] == query) & (heads["statistic"] == statistic)].empty
                continue
            row = one(heads, layer=layer, head=head, query=query, statistic=statistic)
            values = ours[column].to_numpy()
            if column == "coverage_90":
                shares = [v / counts[s] for v, s in zip(values, ours["sample"], strict=True) if counts[s]]
                values = np.array(shares)
            low, high = scipy.stats.t.interval(
                0.95, len(values) - 1, loc=values.mean(), scale=max(scipy.stats.sem(values), 1e-300)
            )
            assert np.allclose([row["mean"], row["low"], row["high"]], [values.mean(), low, high])
            assert row["phase"] == ("decode" if query == "generated" else "prefill")
            seen = len(VISION) if column.startswith(("mass", "text", "entropy")) else len(VISION) - 1
            assert row["n"] == len(values) == (len(VISION) if column == "overlap_4" else seen)


def test_sinks_are_means_of_the_rows(run: RunDirectory, profile: Profile) -> None:
    stats = run.stats()
    for column, sink in (("mass_sink", "first"), ("text_sink", "text")):
        ours = stats[(stats["layer"] == 1) & (stats["query"] == "text")]
        row = one(profile["sinks"], layer=1, query="text", sink=sink)
        assert row["mean"] == pytest.approx(ours.groupby("sample")[column].mean().mean())
        assert row["low"] <= row["mean"] <= row["high"]


def test_by_sample_has_the_means_of_the_other_frames(profile: Profile) -> None:
    table = profile["by_sample"]
    assert len(table) == LAYERS * len(VISION) * 5
    means = table.groupby(["layer", "phase", "query"]).mean(numeric_only=True)
    for name, frame, where in (
        ("mass_vision", profile["mass"], {"modality": "vision"}),
        ("coverage_80", profile["coverage"], {"level": 80}),
        ("window_90", profile["window"], {"level": 90}),
        ("entropy", profile["entropy"], {}),
        ("text_sink", profile["sinks"], {"sink": "text"}),
    ):
        for key, value in where.items():
            frame = frame[frame[key] == value]
        wanted = frame.set_index(["layer", "phase", "query"])["mean"]
        assert np.allclose(means[name].reindex(wanted.index), wanted, rtol=1e-5)


# concentration ---------------------------------------------------------------------------------


def test_concentration_by_its_definitions() -> None:
    rng = np.random.default_rng(0)
    for rows, layers, count in ((1, 2, 1), (2, 3, 2), (4, 2, 57), (3, 1, 300)):
        scores = np.exp(3 * rng.normal(size=(rows, layers, count))).astype(np.float32) * 1e-3
        scores[0, 0] = 0.0
        found = concentration(scores)
        for layer in range(layers):
            wanted: dict[str, list[float]] = {name: [] for name in STATISTICS}
            for row in scores[:, layer].astype(float):
                looks = row.sum() > 0
                few = sum(1 for score in row if score < 0.01 * max(row)) / count
                wanted["sparsity"].append(few if looks else 1.0)
                wanted["entropy"].append(scipy.stats.entropy(row) if looks else 0.0)
                skewed = looks and count > 2
                wanted["skewness"].append(scipy.stats.skew(row, bias=False) if skewed else 0.0)
            assert np.allclose(found[layer], [np.mean(values) for values in wanted.values()])
    equal = concentration(np.full((2, 1, 33), 0.01, dtype=np.float32))
    assert np.allclose(equal, [[0.0, np.log(33), 0.0]])
    assert np.isnan(concentration(np.zeros((0, 2, 5), dtype=np.float32))).all()


def test_concentration_of_a_profile_leaves_out_what_was_not_recorded(
    run: RunDirectory, profile: Profile
) -> None:
    seen = [i for i, count in enumerate(VISION) if count]
    for query, of in (("last", seen), ("step", seen), ("instruction", [i for i in seen if i != 1])):
        scores = {i: run.scores(f"s{i}")["decode" if query == "step" else query] for i in of}
        values = [concentration(s if query == "step" else s[None])[2] for s in scores.values()]
        for index, statistic in enumerate(STATISTICS):
            row = one(profile["concentration"], layer=2, query=query, statistic=statistic)
            assert row["mean"] == pytest.approx(np.mean([value[index] for value in values]))
            assert row["n"] == len(of)


# horizon ---------------------------------------------------------------------------------------


def masses(curves: dict[str, list[list[float]]]) -> pd.DataFrame:
    """A table of `by_sample` with the vision mass `[sample][layer]` of each query; None is no row."""
    rows = [
        {"sample": f"s{s}", "layer": layer, "phase": "?", "query": query, "mass_vision": mass}
        for query, samples in curves.items()
        for s, sample in enumerate(samples)
        for layer, mass in enumerate(sample)
    ]
    return pd.DataFrame(rows)


def test_horizon_is_the_first_layer_from_which_on_all_are_below() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        layers, samples = int(rng.integers(1, 7)), int(rng.integers(1, 6))
        values = rng.choice([0.0, 0.001, 0.02, 0.2], size=(2, samples, layers), p=[0.4, 0.3, 0.2, 0.1])
        table = masses({"last": values[0].tolist(), "generated": values[1].tolist()})
        found = horizon(table, layers).set_index("query")
        firsts = []
        for index, query in enumerate(("last", "generated")):
            mean = values[index].mean(axis=0)
            first = next(
                h for h in range(layers + 1) if all(mean[layer] < 0.01 for layer in range(h, layers))
            )
            firsts.append(first)
            own = [sample[-1] >= 0.01 for sample in values[index]]
            assert (found["layer"][query] is pd.NA) == (first == layers)
            assert first == layers or found["layer"][query] == first
            assert found["to_the_end"][query] == pytest.approx(np.mean(own))
            assert found["n"][query] == samples
        assert found["layer"].fillna(layers)["any"] == max(firsts)
        low, high = found["low"].fillna(layers), found["high"].fillna(layers)
        assert samples == 1 or (low <= high).all()


def test_horizon_interval_is_the_bootstrap_over_samples() -> None:
    # layer 1 reaches the threshold just if the outlier is drawn twice or more of 6 draws
    table = masses({"last": [[0.5, 0.001, 0.0]] * 5 + [[0.5, 0.04, 0.0]]})
    row = one(horizon(table, 3, threshold=0.0105), query="last")
    assert (row["layer"], row["low"], row["high"]) == (1, 1, 2)
    sure = masses({"last": [[0.5, 0.1, 0.0]] * 6})
    assert list(one(horizon(sure, 3), query="any")[["layer", "low", "high"]]) == [2, 2, 2]
    to_the_end = one(horizon(masses({"text": [[0.1, 0.2]] * 3}), 2), query="text")
    assert to_the_end[["layer", "low", "high"]].isna().all()
    assert to_the_end["to_the_end"] == 1.0
    lone = one(horizon(masses({"last": [[0.5, 0.0]]}), 2), query="last")
    assert lone["layer"] == 1
    assert lone[["low", "high"]].isna().all()


def test_horizon_of_a_profile(profile: Profile, tmp_path: Path) -> None:
    found = profile.horizon()
    assert list(found["query"]) == ["text", "last", "generated", "any"]
    assert (found["n"] == len(VISION) - 1).all(), "a sample without vision tokens does not count"
    assert found["layer"].isna().all(), "random attention looks at vision in every layer"
    assert list(profile.horizon(threshold=1.0)["layer"]) == [0, 0, 0, 0]
    for threshold in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"threshold must be in \(0, 1\], got"):
            profile.horizon(threshold)
    assert Profile.from_run(write_run(tmp_path / "blind", (0, 0))).horizon().empty


# text windows ----------------------------------------------------------------------------------


def test_windows_are_the_smallest_edges_that_hold_their_share_of_real_rows() -> None:
    """From attention weights, by counting tokens back from each query."""
    rng = np.random.default_rng(4)
    edges, sink = (1, 2, 3, 4, 6, 8, 12), 2
    kinds = "s" * 2 + "t" * 3 + "v" * 5 + "t" * 13 + "g" * 7
    text = [i for i, kind in enumerate(kinds) if kind in "tg"]
    queries = list(range(23, 30))
    stats, brute = [], {}
    for layer in range(5):
        weights = np.zeros((len(queries), len(kinds)))
        bins = np.zeros(len(edges) + 1)
        for row, query in enumerate(queries):
            weights[row, : query + 1] = rng.dirichlet(np.full(query + 1, 0.3))
            for key in text[sink:]:
                behind = sum(1 for token in text if key < token <= query)
                bins[sum(1 for edge in edges if edge <= behind)] += weights[row, key] / len(queries)
        place = {"sample": "a", "layer": layer, "head": -1, "phase": "decode", "query": "generated"}
        stats.append(place | {"distance": bins.tolist()})
        held = [
            sum(
                weights[row, key]
                for row, query in enumerate(queries)
                for key in [k for k in text if k <= query][-window:]
                if key not in text[:sink]
            )
            for window in range(1, len(text) + 1)
        ]
        brute[layer] = [value / held[-1] for value in held]
    reached = reach(head_mean(pd.DataFrame(stats)), edges, len(text))
    levels = (10, 50, 80, 95, 100)
    windows = smallest_windows(reached, levels).set_index("layer")
    known = [*edges, len(text)]
    curve = window_curve(reached)
    for layer, shares in brute.items():
        for level in levels:
            exact = next(w for w, share in enumerate(shares, start=1) if share >= level / 100 - 1e-9)
            smallest = next(edge for edge in known if edge >= exact)
            assert windows.loc[layer, f"window_{level}"] == smallest
            assert windows_for(curve, level / 100, 5)[layer] == smallest
        for edge in edges:
            assert one(curve, layer=layer, distance=edge)["mean"] == pytest.approx(shares[edge - 1])


def test_a_text_share_sets_the_window_of_every_layer(profile: Profile) -> None:
    policy = profile.derive(budget=0.5, text=0.8)
    curve = profile["window_curve"].query("query == 'generated'")
    assert isinstance(policy.text.window, tuple)
    for layer, window in enumerate(policy.text.window):
        held = curve[curve["layer"] == layer].set_index("distance")["mean"]
        assert held[window] >= 0.8
        assert (held[held.index < window] < 0.8).all()
    assert policy.text.sink == profile.meta.settings.text_sink
    assert policy.provenance is not None
    assert policy.provenance.measured_budget is not None
    assert policy.provenance.measured_budget <= 0.5
    with pytest.raises(UserError, match=r"text must be in \[0, 1\], got 2"):
        profile.derive(budget=0.5, text=2)
    with pytest.raises(UserError, match="leave read_budget and text out"):
        profile.derive(coverage=0.5, text=0.5)
    with pytest.raises(UserError, match="leave read_budget and text out"):
        profile.derive(coverage=0.5, text=policy.text)


# differences -----------------------------------------------------------------------------------


def plain(profile: Profile, layer: int, query: str, statistic: str) -> dict[str, float]:
    table = profile["by_sample"]
    ours = table[(table["layer"] == layer) & (table["query"] == query)].set_index("sample")[statistic]
    return {str(sample): float(value) for sample, value in ours.items() if not np.isnan(value)}


def test_runs_of_the_same_samples_are_compared_in_pairs(profile: Profile, tmp_path: Path) -> None:
    other = Profile.from_run(write_run(tmp_path / "run", VISION[:7], seed=5, policy="p"))
    table = profile.diff(other)
    assert set(table["how"]) == {"paired"}
    for layer, query, statistic in (
        (0, "last", "mass_vision"),
        (3, "generated", "coverage_90"),
        (2, "generated", "window_95"),
        (1, "generated", "overlap_4"),
        (1, "text", "text_sink"),
    ):
        ours, theirs = (plain(p, layer, query, statistic) for p in (profile, other))
        both = sorted(ours.keys() & theirs.keys())
        changes = np.array([ours[sample] - theirs[sample] for sample in both])
        row = one(table, layer=layer, query=query, statistic=statistic)
        found = scipy.stats.ttest_1samp(changes, 0.0).confidence_interval()
        assert np.allclose([row["mean"], row["low"], row["high"]], [changes.mean(), *found], rtol=1e-4)
        assert row["here"] == pytest.approx(np.mean([ours[sample] for sample in both]), rel=1e-5)
        assert row["other"] == pytest.approx(np.mean([theirs[sample] for sample in both]), rel=1e-5)
        assert row["n"] == row["n_other"] == len(both)


@pytest.mark.parametrize("changes", [{"first": 100}, {"task": "other"}])
def test_runs_of_other_samples_are_compared_as_independent(
    profile: Profile, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = Profile.from_run(write_run(tmp_path / "run", (14, 30, 22), seed=6, **changes))
    table = profile.diff(other)
    assert set(table["how"]) == {"unpaired"}
    for layer, query, statistic in ((0, "last", "mass_vision"), (2, "generated", "coverage_90")):
        ours, theirs = (list(plain(p, layer, query, statistic).values()) for p in (profile, other))
        row = one(table, layer=layer, query=query, statistic=statistic)
        found = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
        wanted = [np.mean(ours) - np.mean(theirs), *found]
        assert np.allclose([row["mean"], row["low"], row["high"]], wanted, rtol=1e-4)
        assert (row["n"], row["n_other"]) == (len(ours), len(theirs))


def test_a_profile_does_not_differ_from_itself(profile: Profile) -> None:
    table = profile.diff(profile)
    assert (table[["mean", "low", "high"]] == 0).all(axis=None)
    alone = replace(profile, meta=profile.meta.model_copy(update={"samples": 1}))
    assert not alone.diff(profile).empty


def test_only_what_is_comparable_is_compared(profile: Profile, tmp_path: Path) -> None:
    other = Profile.from_run(
        write_run(tmp_path / "run", VISION, top_share=0.2, text_sink=8, lags=(1, 2), coverages=(50, 80, 90))
    )
    statistics = set(profile.diff(other)["statistic"])
    assert {"mass_vision", "coverage_80", "mass_sink"} <= statistics
    assert not {s for s in statistics if s.startswith(("overlap", "window", "text_sink"))}
    assert "coverage_95" not in statistics
    longer = Profile.from_run(write_run(tmp_path / "long", (9, 9), layers=6))
    with pytest.raises(UserError, match="profiles of 4 and 6 layers cannot be compared layer by layer"):
        profile.diff(longer)


# findings --------------------------------------------------------------------------------------


def with_vision(profile: Profile, mass: list[float]) -> Profile:
    """A profile whose layers give vision this share of attention in every row."""
    frames = dict(profile.frames)
    rows = profile["by_sample"]
    rows["mass_vision"] = rows["layer"].map(dict(enumerate(mass)))
    table = profile["mass"]
    vision = table["modality"] == "vision"
    table.loc[vision, ["mean", "low", "high"]] = table["layer"].map(dict(enumerate(mass)))
    return replace(profile, frames=frames | {"by_sample": rows, "mass": table})


def test_findings_name_the_layers_that_look_and_the_horizon(profile: Profile) -> None:
    said = findings(with_vision(profile, [0.1, 0.6, 0.4, 0.001]))
    assert said[0] == (
        "Layers 1-2 look at the image most, with 40% to 60% of their attention, layer 3 least, with 0.1% "
        "(while decoding)."
    )
    assert said[1] == "The horizon is layer 3: from there on vision gets less than 1% of the attention."
    said = findings(with_vision(profile, [0.5, 0.1, 0.0, 0.0]))
    assert said[0].startswith("Layer 0 looks at the image most, with 50% of its attention, layers 2-3 least")
    assert said[1].startswith("The horizon is layer 2:")
    said = findings(with_vision(profile, [0.5, 0.1, 0.3, 0.7]))
    assert said[0].startswith("Layers 0, 3 look at the image most, with 50% to 70%")
    assert said[1] == "There is no horizon: the last layer still gives vision 70% of its attention."
    assert findings(with_vision(profile, [0.0] * 4))[:2] == [
        "No layer looks at the image while decoding.",
        "No layer gives vision 1% of its attention: the model hardly looks at the image.",
    ]


def with_intervals(profile: Profile, **frames: list[tuple[float, float, float]]) -> Profile:
    """A profile with these means and intervals, a layer each, in every row of the frames."""
    changed = dict(profile.frames)
    for name, layers in frames.items():
        table = changed[name].copy()
        for column, values in zip(("mean", "low", "high"), zip(*layers, strict=True), strict=True):
            table[column] = table["layer"].map(dict(enumerate(values)))
        changed[name] = table
    return replace(profile, frames=changed)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (
            [(0.5, 0.4, 0.6), (0.4, 0.35, 0.5), (0.3, 0.2, 0.39), (0.2, 0.1, 0.3)],
            "The image gets 20% to 50% of a layer's attention (while decoding); "
            "the samples do not show which layer looks more than another.",
        ),
        (
            [(0.5, 0.45, 0.6), (0.48, 0.4, 0.5), (0.2, 0.15, 0.25), (0.19, 0.1, 0.3)],
            "Layers 0-1 look at the image most, with 48% to 50% of their attention, "
            "layers 2-3 least, with 19% to 20% (while decoding).",
        ),
        (
            [(0.5, 0.45, 0.6), (0.1, 0.05, 0.15), (0.2, 0.15, 0.25), (0.01, 0.0, 0.02)],
            "Layer 0 looks at the image most, with 50% of its attention, layer 3 least, with 1.0% "
            "(while decoding).",
        ),
        (
            [(0.5, math.nan, math.nan)] * 4,
            "The image gets 50% of a layer's attention (while decoding); "
            "the samples do not show which layer looks more than another.",
        ),
    ],
)
def test_findings_tell_layers_apart_only_where_intervals_part(
    profile: Profile, layers: list[tuple[float, float, float]], said: str
) -> None:
    assert findings(with_intervals(profile, mass=layers))[0] == said


def test_the_foremost_layer_is_named_only_where_its_interval_parts(profile: Profile) -> None:
    apart = [(0.9, 0.85, 0.95), (0.5, 0.4, 0.6), (0.5, 0.4, 0.6), (0.5, 0.4, 0.6)]
    two = [(0.9, 0.85, 0.95), (0.8, 0.7, 0.9), (0.5, 0.4, 0.6), (0.5, 0.4, 0.6)]
    chain = [(0.9, 0.85, 0.95), (0.8, 0.7, 0.9), (0.65, 0.5, 0.75), (0.5, 0.4, 0.6)]
    curve = profile["window_curve"]
    curve.loc[(curve["layer"] > 0) & (curve["distance"] >= 8), "mean"] = 0.97  # so that windows differ
    profile = replace(profile, frames=dict(profile.frames) | {"window_curve": curve})
    names = ("coverage", "window", "sinks")
    said = " ".join(findings(with_intervals(profile, **dict.fromkeys(names, apart))))
    for words in ("; layer 0 needs the most.", "; layer 0 reaches furthest.", ", most in layer 0."):
        assert words in said
    said = " ".join(findings(with_intervals(profile, **dict.fromkeys(names, two))))
    for words in ("; layers 0-1 need the most.", "; layers 0-1 reach furthest.", ", most in layers 0-1."):
        assert words in said
    said = " ".join(findings(with_intervals(profile, **dict.fromkeys(names, chain))))
    for words in ("the most.", "furthest", ", most in"):
        assert words not in said


@pytest.mark.parametrize(("count", "advised"), [(2, False), (9, False), (10, True), (40, True)])
def test_advice_needs_ten_answers(profile: Profile, count: int, advised: bool) -> None:
    table = profile["drift"].assign(n=count)
    changed = replace(profile, frames=dict(profile.frames) | {"drift": table})
    said = next(sentence for sentence in findings(changed) if "Of the" in sentence)
    if advised:
        assert "refresh a core every" in said
    else:
        assert f": {count} answers, too few to say how often to refresh a core (" in said
        assert f"({10 - count} more of such length needed)." in said


@pytest.mark.full  # runs of two models
def test_the_embedded_model_is_believed_about_its_own_pictures_alone(tmp_path: Path) -> None:
    def first(path: str, model: str, task: str) -> str:
        return findings(Profile.from_run(write_run(tmp_path / path, (9, 8), model=model, task=task)))[0]

    assert first("a", "tiny", "pets").startswith("Beware: the embedded model knows only pictures such as")
    assert first("a2", "small", "shapes").startswith("Beware: the model 'small' knows only pictures such as")
    assert not first("a3", "small", "pages:describe").startswith("Beware")
    assert first("a4", "tiny-mrope", "pages").startswith("Beware: the embedded model knows only")
    assert first("a5", "tiny", "shapes-sizes").startswith("Beware")
    own = [("tiny", "shapes:count"), ("tiny", "shapes"), ("tiny-mrope", "shapes-sizes"), ("llava", "pets")]
    for number, (model, task) in enumerate(own):
        assert "embedded" not in first(f"own{number}", model, task)


def test_findings_give_the_window_that_derive_would_set(profile: Profile) -> None:
    said = " ".join(findings(profile))
    windows = profile.derive(budget=0.9, text=0.95).text.window
    assert isinstance(windows, tuple)
    assert f"lies on the newest {min(windows)}" in said
    assert str(max(windows)) in said


def test_findings_say_what_a_run_cannot_show(tmp_path: Path) -> None:
    still = findings(Profile.from_run(write_run(tmp_path / "still", (9, 14), decode=False)))
    assert all("decoding" not in sentence for sentence in still)
    assert still[-1] == "All of this rests on 2 samples: trace more before you rely on it."
    blind = findings(Profile.from_run(write_run(tmp_path / "blind", (0,))))
    assert blind[0] == "No sample has vision tokens, so there is nothing to say about vision."
    assert any("text" in sentence for sentence in blind[1:])
    assert blind[-1].startswith("All of this rests on 1 sample:")
    for sentence in (*still, *blind):
        assert sentence.endswith((".", "it."))
        assert "nan" not in sentence


# command line ----------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="avlprof")


def test_every_table_is_printed(run: RunDirectory, profile: Profile) -> None:
    for what in VIEWS:
        result = invoke("analyze", run.path, "--what", what, "--no-figures", "--format", "json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
        table = profile[what]
        assert len(rows) == len(table)
        assert list(rows[0]) == list(table.columns)
    assert "none" in invoke("analyze", run.path, "--what", "horizon").stdout
    assert not (run.path / "figures").exists()
    missing = invoke("analyze", run.path, "--what", "horizn")
    assert missing.exit_code == 2
    assert "unknown table 'horizn'; did you mean horizon?" in missing.stderr


def test_the_summary_ends_in_findings(run: RunDirectory, profile: Profile) -> None:
    result = invoke("analyze", run.path, "--no-figures")
    assert result.stdout.splitlines()[-len(findings(profile)) :] == findings(profile)
    as_data = invoke("analyze", run.path, "--no-figures", "--format", "json")
    assert len(json.loads(as_data.stdout)) == LAYERS
    assert findings(profile)[0] in as_data.stderr


def test_runs_are_compared_by_the_command(run: RunDirectory, profile: Profile, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", VISION, seed=9)
    result = invoke("analyze", run.path, "--against", other.path)
    assert result.exit_code == 0, result.output
    assert f"{len(VISION)} samples that both runs have, each compared with itself" in result.stdout
    table = profile.diff(Profile.from_run(other))
    row = one(table, layer=0, query="last", statistic="mass_vision")
    sure = "*" if row["low"] > 0 or row["high"] < 0 else ""
    assert result.stdout.splitlines()[2].split()[1] == f"{100 * row['mean']:+.1f}pp{sure}"
    full = json.loads(invoke("analyze", run.path, "--against", other.path, "--format", "json").stdout)
    assert len(full) == len(table)
    both = invoke("analyze", run.path, "--against", other.path, "--what", "mass")
    assert both.exit_code == 2
    assert "give either --what or --against" in both.stderr


def test_derive_takes_every_allocator_its_knobs_and_a_text_share(run: RunDirectory, tmp_path: Path) -> None:
    helped = invoke("derive", "--help").stdout
    assert all(name in helped for name in ALLOCATORS.names())
    out = tmp_path / "p.yaml"
    start = ("derive", run.path, "--budget", 0.6, "-o", out, "--mix", 1)
    steep = invoke(*start, "--allocator", "sigmoid", "--option", "steepness=0", "--text-share", 0.9)
    assert steep.exit_code == 0, steep.output
    assert "window" in out.read_text(encoding="utf-8")
    for option, problem in (("steepness", "must be NAME=NUMBER"), ("steep=2", "did you mean steepness?")):
        refused = invoke(*start, "--allocator", "sigmoid", "--option", option)
        assert refused.exit_code == 2
        assert problem in refused.stderr
