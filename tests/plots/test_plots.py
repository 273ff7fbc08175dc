"""Figures: what they say is checked against plain arithmetic, how they look only for labels and leaks."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.transforms import Transform

from avlprof import plots
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.models.tiles import Tile, grid
from avlprof.plots.pareto import unbeaten
from avlprof.plots.pictures import arrange
from avlprof.plots.style import THEME, layer_colours, theme
from avlprof.policy import PicturePolicy, Policy
from tests.helpers import few, thinned
from tests.plots.made import (
    ROUTES,
    all_text,
    beside_frames,
    budgets_frame,
    coverage_frame,
    diff_frame,
    drawn_figures,
    drift_frame,
    equal_bytes,
    every_figure,
    head_frame,
    head_overlap_frame,
    horizon_frame,
    importances_frame,
    knobs_frame,
    knockout_frame,
    mass_frame,
    over,
    overlap_frame,
    pareto_frame,
    picture,
    policies,
    sink_frame,
    trials_frame,
    vision_frame,
    window_frame,
)
from tests.synthetic_run import write_run

DEPTHS = (1, 6, 48)
FORMATS = [
    ("png", b"\x89PNG"),
    pytest.param("svg", b"<?xml", marks=pytest.mark.full),
    pytest.param("pdf", b"%PDF", marks=pytest.mark.full),
]


def settings() -> dict[str, Any]:
    """What a theme may change; the backend is settled by whoever draws first."""
    return {name: value for name, value in mpl.rcParams.items() if not name.startswith("backend")}


SETTINGS = settings()


@pytest.mark.parametrize("layers", thinned(DEPTHS, (6,)))
def test_figures_are_labelled_and_leave_nothing_behind(layers: int) -> None:
    for name, figure in every_figure(layers).items():
        assert isinstance(figure, Figure), name
        assert figure.get_suptitle(), name
        visible = [ax for ax in figure.axes if ax.axison]
        assert visible, name
        labels = {ax.get_xlabel() for ax in visible} | {ax.get_ylabel() for ax in visible}
        assert labels - {""}, name
        if name not in ("heatmap", "words", "head heatmaps"):
            drawn = [ax for ax in visible if ax.get_label() != "<colorbar>"]
            assert any(ax.get_xlabel() for ax in drawn), name
            assert any(ax.get_ylabel() for ax in drawn), name
    assert settings() == SETTINGS
    assert plt.get_fignums() == []


@pytest.mark.parametrize("layers", few(DEPTHS, (6,)))
def test_legends_do_not_grow_with_depth(layers: int) -> None:
    for name, figure in every_figure(layers).items():
        entries = sum(len(legend.get_texts()) for legend in figure.legends)
        assert entries <= 8, name
        bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
        if name in ("coverage", "drift", "window"):
            assert len(bars) == (1 if layers > 8 else 0), name


def words_of(figure: Figure) -> str:
    return "\n".join(" ".join(text.get_text().split()) for text in all_text(figure))


@pytest.mark.parametrize("layers", thinned([6, 48], [6], []))
def test_text_stays_inside_the_figure(layers: int) -> None:
    for name, figure in drawn_figures(layers).items():
        width, height = figure.get_size_inches() * figure.dpi
        for text in all_text(figure):
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= -1, (name, text.get_text())
            assert max(box.x1 - width, box.y1 - height) <= 1, (name, text.get_text())


@pytest.mark.parametrize("layers", thinned((6, 48), ()))
def test_nothing_on_an_axis_is_moved_from_its_value(layers: int) -> None:
    """Points of equal bytes once stood apart, so that the tuned policy looked cheaper than its rivals."""
    for name, figure in drawn_figures(layers).items():
        for ax in figure.axes:
            level, upright = ax.get_yaxis_transform(), ax.get_xaxis_transform()
            allowed = [ax.transData, level, upright, ax.transAxes]
            for line in ax.lines:
                check_unmoved(name, line.get_xydata(), line.get_transform(), allowed)
            for group in ax.collections:
                offsets = group.get_offset_transform()
                if isinstance(group, PathCollection):
                    check_unmoved(name, np.asarray(group.get_offsets()), offsets, allowed)
                else:
                    segments = [path.vertices for path in group.get_paths()] or [np.zeros((0, 2))]
                    check_unmoved(name, np.concatenate(segments), group.get_transform(), allowed)


def check_unmoved(name: str, points: Any, transform: Transform, allowed: list[Transform]) -> None:
    points = np.ma.getdata(points).astype(float)
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return
    drawn = transform.transform(points)
    assert any(np.allclose(drawn, one.transform(points), atol=1e-6) for one in allowed), name


def test_the_front_has_equal_bytes_at_one_place_and_tells_policies_apart() -> None:
    info = plots.budget_front_info(equal_bytes())
    figure = plots.budget_front(info)
    FigureCanvasAgg(figure).draw()
    ax = figure.axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    for line in info.lines:
        drawn = lines[line.name]
        pixels = drawn.get_transform().transform(drawn.get_xydata())[:, 0]
        np.testing.assert_allclose(pixels, [ax.transData.transform((c, 0.5))[0] for c in (0.1, 0.2)])
    own = [lines[line.name] for line in info.lines]
    assert len({line.get_color() for line in own}) == len({line.get_marker() for line in own}) == 4
    sizes = [line.get_markersize() for line in own]
    assert sizes == sorted(set(sizes)), "who is behind is larger"
    bars = [group for group in ax.collections if isinstance(group, LineCollection)]
    widths = [bar.get_linewidth()[0] for bar in bars]
    assert widths == sorted(set(widths))
    for bar, line in zip(bars, info.lines, strict=True):
        ends = np.array([segment[:, 1] for segment in bar.get_segments()])
        np.testing.assert_allclose(ends, np.stack([line.low, line.high], axis=1))


@pytest.mark.parametrize("families", few([2, 4, 14], [4]))
def test_the_pareto_figure_has_true_costs_and_a_named_interval_for_each_policy(families: int) -> None:
    info = plots.pareto_info(equal_bytes(families))
    figure = plots.pareto_front(info)
    FigureCanvasAgg(figure).draw()
    plane, named = figure.axes
    dots = [group for group in plane.collections if isinstance(group, PathCollection)]
    for line, group in zip(info.lines, dots, strict=True):
        np.testing.assert_allclose(group.get_offsets(), np.stack([line.cost, line.score], axis=1))
        pixels = group.get_offset_transform().transform(group.get_offsets())
        np.testing.assert_allclose(pixels, plane.transData.transform(group.get_offsets()))
    names = [policy for line in info.lines for policy in line.policies]
    assert [text.get_text() for text in named.get_xticklabels()] == names
    bars = [group for group in named.collections if isinstance(group, LineCollection)]
    segments = [segment for bar in bars for segment in bar.get_segments()]
    ends = [(low, high) for line in info.lines for low, high in zip(line.low, line.high, strict=True)]
    for slot, (segment, (low, high)) in enumerate(zip(segments, ends, strict=True)):
        np.testing.assert_allclose(segment, [[slot, low], [slot, high]])
    looks = {(tuple(group.get_facecolor()[0]), group.get_paths()[0].vertices.tobytes()) for group in dots}
    assert len(looks) == families
    boxes = [text.get_window_extent() for text in named.get_xticklabels()]
    if families == 14:
        assert all(one.x1 <= other.x0 + 1 for one, other in itertools.pairwise(boxes)), "names touch"


def test_methods_at_equal_bytes_share_a_panel_without_an_axis_of_bytes() -> None:
    info = plots.budgets_info(budgets_frame())
    figure = plots.quality_by_budget(info)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["10% of the dense KV", "40% of the dense KV"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "dense",
        *(line.method for line in info.lines),
    ]
    for column, ax in enumerate(figure.axes):
        assert len(ax.get_xticks()) == 0
        bars = [group for group in ax.collections if isinstance(group, LineCollection)]
        segments = [segment for bar in bars for segment in bar.get_segments()]
        known = [i for i, line in enumerate(info.lines) if np.isfinite(line.score[column])]
        for slot, segment in zip(known, segments, strict=True):
            line = info.lines[slot]
            np.testing.assert_allclose(segment, [[slot, line.low[column]], [slot, line.high[column]]])
    assert len(known) == 4


def test_mass_is_what_the_frame_says_and_bars_reach_one() -> None:
    frame = mass_frame(5)
    info = plots.mass_info(frame)
    assert [panel.title.split(":")[0] for panel in info.panels] == ["Prefill", "Decode"]
    assert info.panels[0].modalities == ("vision", "text", "system", "learned_sink")
    assert info.note == "mean over 7 samples"
    for panel, query in zip(info.panels, ("last", "generated"), strict=True):
        np.testing.assert_allclose(panel.share.sum(axis=1), 1.0)
        for i, layer in enumerate(panel.layers):
            for j, name in enumerate(panel.modalities):
                chosen = frame[(frame.layer == layer) & (frame["query"] == query) & (frame.modality == name)]
                assert panel.share[i, j] == pytest.approx(chosen["mean"].item())


def test_learned_sinks_are_a_band_of_their_own_where_a_model_has_them() -> None:
    frame = mass_frame(3)
    assert "Learned sink" in words_of(plots.modality_mass(plots.mass_info(frame)))
    without = plots.mass_info(frame[frame["modality"] != "learned_sink"])
    assert without.panels[1].modalities == ("vision", "text", "generated", "system")
    assert "Learned sink" not in words_of(plots.modality_mass(without))


def test_mass_has_the_interval_of_vision_and_the_horizon_of_its_rows() -> None:
    frame = mass_frame(4)
    last, generated = plots.mass_info(frame, horizon_frame(4)).panels
    for panel, query in ((last, "last"), (generated, "generated")):
        for layer, low, high in zip(panel.layers, panel.low, panel.high, strict=True):
            own = frame[(frame.layer == layer) & (frame["query"] == query) & (frame.modality == "vision")]
            assert (low, high) == (own["low"].item(), own["high"].item())
    assert last.horizon is not None and last.horizon.words == "layer 2 (95%: 0 to 2)"
    assert generated.horizon is not None and generated.horizon.words == "layer 0 (95%: 0 to none)"
    assert plots.mass_info(frame).panels[0].horizon is None
    lines = [len(ax.lines) for ax in plots.modality_mass(plots.mass_info(frame, horizon_frame(4))).axes]
    without = [len(ax.lines) for ax in plots.modality_mass(plots.mass_info(frame)).axes]
    assert [a - b for a, b in zip(lines, without, strict=True)] == [1, 1]


def test_mass_says_which_rows_have_no_horizon() -> None:
    frame, marks = mass_frame(4), horizon_frame(4)
    assert plots.mass_info(frame, marks).without == ""
    assert plots.mass_info(frame).without == ""
    marks.loc[marks["query"] == "generated", ["layer", "low", "high"]] = None
    figure = plots.modality_mass(plots.mass_info(frame, marks))
    assert "no horizon in decode" in words_of(figure)
    marks.loc[:, ["layer", "low", "high"]] = None
    assert plots.mass_info(frame, marks).without == "no horizon in prefill and decode"


def test_horizon_lines_are_the_frame_in_layer_order() -> None:
    frame = vision_frame(5)
    info = plots.horizon_info(frame, horizon_frame(5), 0.02)
    assert info.threshold == 0.02
    assert [line.title for line in info.lines] == [
        "Text of the prompt",
        "Last prompt token",
        "Generated tokens",
    ]
    assert [line.horizon.layer for line in info.lines] == [None, 2, 0]
    for line, query in zip(info.lines, ("text", "last", "generated"), strict=True):
        assert line.layers == (0, 1, 2, 3, 4)
        for layer in line.layers:
            own = frame[(frame["layer"] == layer) & (frame["query"] == query)]
            assert line.share[layer] == own["mean"].item()
            assert (line.low[layer], line.high[layer]) == (own["low"].item(), own["high"].item())
    only = plots.horizon_info(frame[frame["query"] == "last"], horizon_frame(5), 0.02)
    assert len(only.lines) == 1


def test_the_horizon_of_a_profile_counts_samples_with_vision_alone(tmp_path: Path) -> None:
    profile = Profile.from_run(write_run(tmp_path, vision=(7, 0, 5)))
    figure = plots.vision_horizon(profile, 0.3)
    said = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    row = profile.horizon(0.3).set_index("query").loc["last"]
    assert ("none" if pd.isna(row["layer"]) else f"layer {row['layer']:.0f}") in said
    drawn = {line.get_label().split("\n")[0]: line.get_ydata() for line in figure.axes[0].lines}
    table = profile["by_sample"]
    for layer in range(profile.layers):
        own = table[(table["query"] == "last") & (table["layer"] == layer)]
        seen = [row.mass_vision for row in own.itertuples() if row.sample != "s1"]
        assert drawn["Last prompt token"][layer] == pytest.approx(sum(seen) / len(seen))


def test_sinks_by_kind_and_layer() -> None:
    frame = sink_frame(3)
    info = plots.sink_info(frame)
    assert [panel.kinds for panel in info.panels] == [("first", "text")] * 2
    for panel, query in zip(info.panels, ("last", "generated"), strict=True):
        for (i, kind), (j, layer) in itertools.product(enumerate(panel.kinds), enumerate(panel.layers)):
            own = frame[(frame["query"] == query) & (frame["sink"] == kind) & (frame["layer"] == layer)]
            assert panel.share[i, j] == own["mean"].item()
            assert (panel.low[i, j], panel.high[i, j]) == (own["low"].item(), own["high"].item())


def test_head_maps_are_of_decoding_if_there_is_any() -> None:
    frame = head_frame(3, heads=5)
    info = plots.head_info(frame)
    assert [one.statistic for one in info.maps] == ["vision", "sink"]
    assert info.rows == "generated tokens"
    for one in info.maps:
        assert (one.halves.median, one.halves.widest) == pytest.approx((0.1, 0.1))
    for one, (i, j) in itertools.product(info.maps, itertools.product(range(3), range(5))):
        own = frame[(frame["layer"] == i) & (frame["head"] == j) & (frame["phase"] == "decode")]
        assert one.values[i, j] == own[own["statistic"] == one.statistic]["mean"].item()
    prefill = plots.head_info(frame[frame["phase"] == "prefill"], ("entropy",))
    assert (prefill.rows, prefill.maps[0].values.shape) == ("last prompt token", (3, 5))


def test_overlaps_of_heads_are_within_their_layer() -> None:
    frame = head_overlap_frame(3, heads=5)
    info = plots.head_overlap_info(frame, 0.1)
    assert [one.statistic for one in info.maps] == ["shared", "others"]
    assert info.rows == "one decoding step"
    assert "(random ones: 10%)" in info.note
    shared, others = info.maps
    for i, j in itertools.product(range(3), range(5)):
        of_head = frame[(frame["layer_a"] == i) & (frame["layer_b"] == i) & (frame["head_a"] == j)]
        found = {row.head_b: row.mean for row in of_head.itertuples() if row.query == "step"}
        assert shared.values[i, j] == found[-1]
        assert others.values[i, j] == pytest.approx(sum(found[b] for b in range(5) if b != j) / 4)
    assert shared.top == others.top == max(shared.values.max(), others.values.max())
    assert plots.head_overlap_info(frame[frame["query"] == "last"]).rows == "last prompt token"


def test_closed_routes_stand_by_layer_with_every_layer_last() -> None:
    frame = knockout_frame(6)
    info = plots.knockout_info(frame, "score")
    assert (info.routes, info.layers, info.samples) == (tuple(sorted(ROUTES)), tuple(range(6)), 7)
    kl, change = info.maps
    wanted = [0.5**layer for layer in range(6)]
    np.testing.assert_allclose(kl.values, [[*wanted, 2.5]] * 3)
    np.testing.assert_allclose(change.values, -kl.values / 3)
    np.testing.assert_array_equal(change.sure, kl.values / 3 > 0.1)
    assert "Change of score" in words_of(plots.knockout_map(info))
    assert [len(plots.knockout_info(frame.drop(columns="difference")).maps)] == [1]
    texts = [text.get_text() for text in plots.knockout_map(frame).axes[0].texts]
    assert {"1.00", ".500 to 1.50", ".031", "2.50"} <= set(texts)
    two = frame.assign(last=frame["last"].where(frame["layer"] < 0, frame["last"] + 1))
    assert "2 layers around each" in plots.knockout_info(two).closed
    with pytest.raises(UserError, match="no single head was closed"):
        plots.knockout_heads(frame[frame["head"] < 0])


def test_damage_stands_above_the_attention_of_the_same_layers() -> None:
    frame, (rows, mass) = knockout_frame(6), beside_frames(6)
    info = plots.beside_info(frame, rows, mass)
    assert (info.layers, [panel.route for panel in info.panels]) == (tuple(range(6)), list(ROUTES[:2]))
    known = mass[mass["route"] == ROUTES[1]].sort_values("layer")
    np.testing.assert_allclose(info.panels[1].mass, known[["mean", "low", "high"]].to_numpy().T)
    np.testing.assert_allclose(info.panels[0].damage[0], [0.5**layer for layer in range(6)])
    assert "rank correlation -0.90 [-1.00, -0.70]" in words_of(plots.damage_beside_attention(info))


def test_differences_are_in_their_units_and_marked_where_sure() -> None:
    frame = diff_frame(6)
    info = plots.diff_info(frame, ("a", "b"))
    assert (info.here, info.other, info.how) == ("a", "b", "7 samples, each against itself")
    wanted = ["mass_vision", "mass_vision", "coverage_90", "overlap_8", "window_95", "entropy"]
    queries = ["last", *["generated"] * 5]
    factors = [100, 100, 100, 100, 1, 1]
    sure = 0
    for panel, statistic, query, factor in zip(info.panels, wanted, queries, factors, strict=True):
        for place, layer in enumerate(panel.layers):
            part = frame[(frame["layer"] == layer) & (frame["query"] == query)]
            row = part[part["statistic"] == statistic].iloc[0]
            assert panel.change[place] == pytest.approx(factor * row["mean"])
            assert panel.low[place] == pytest.approx(factor * row["low"])
            assert panel.sure[place] == (abs(row["mean"]) > 0.2)
            sure += panel.sure[place]
    assert 0 < sure < 36
    prefill = plots.diff_info(frame[frame["query"] == "last"].assign(how="unpaired", n_other=3))
    assert len(prefill.panels) == 4
    assert prefill.how == "7 samples against 3 others"


def test_one_sample_has_differences_but_none_that_is_sure() -> None:
    info = plots.diff_info(diff_frame(2).assign(low=np.nan, high=np.nan))
    assert not any(panel.sure.any() for panel in info.panels)
    assert isinstance(plots.layer_diff(info), Figure)


@pytest.mark.full  # profiles of several runs
def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    def profile(name: str, **changes: str) -> Profile:
        return Profile.from_run(write_run(tmp_path / name, vision=(5, 4), **changes))

    plain = profile("a")
    assert plots.run_names(profile("b", policy="tuned twice"), plain) == ("tuned twice", "dense")
    assert plots.run_names(plain, profile("c", task="other")) == ("noise", "other")
    assert plots.run_names(plain, profile("d", model="x" * 50))[1] == "x" * 27 + "…"
    assert plots.run_names(plain, profile("e"))[0] != ""


def test_a_run_without_decoding_has_one_panel() -> None:
    frame = mass_frame(2)
    info = plots.mass_info(frame[frame["phase"] == "prefill"])
    assert len(info.panels) == 1
    assert len(plots.modality_mass(info).axes) == 1


def test_coverage_follows_the_frame() -> None:
    frame = coverage_frame(4)
    info = plots.coverage_info(frame)
    assert len(info.panels) == 3
    for panel, query in zip(info.panels, ("last", "step", "answer"), strict=True):
        curves = zip(panel.layers, panel.attention, panel.low, panel.high, strict=True)
        for layer, curve, low, high in curves:
            part = frame[(frame["query"] == query) & (frame["layer"] == layer)].sort_values("share_kept")
            np.testing.assert_allclose(panel.kept, part["share_kept"])
            for drawn, name in ((curve, "mean"), (low, "low"), (high, "high")):
                np.testing.assert_allclose(drawn, part[name])


def test_overlap_matrix_and_its_mean_apart() -> None:
    frame = overlap_frame(4)
    info = plots.overlap_info(frame)
    highest = []
    for panel, query in zip(info.panels, ("last", "step"), strict=True):
        total = []
        for a, b in itertools.product(range(4), repeat=2):
            pair = frame[(frame["layer_a"] == a) & (frame["layer_b"] == b) & (frame["query"] == query)]
            assert panel.overlap[a, b] == pytest.approx(pair["mean"].item())
            if a != b:
                total.append(pair["mean"].item())
        assert panel.apart == pytest.approx(sum(total) / len(total))
        assert (panel.halves.median, panel.halves.widest) == pytest.approx((0.1, 0.1))
        highest += total
    assert info.most == pytest.approx(max(highest))


def test_overlap_with_holes_and_of_one_layer() -> None:
    frame = overlap_frame(3)
    holed = plots.overlap_info(frame[~((frame["layer_a"] == 0) & (frame["layer_b"] == 2))])
    assert np.isnan(holed.panels[0].overlap[0, 2])
    assert np.isfinite(holed.panels[0].apart)
    assert np.isnan(plots.overlap_info(overlap_frame(1)).panels[0].apart)


def test_drift_mean_is_over_layers() -> None:
    frame = drift_frame(5)
    info = plots.drift_info(frame)
    assert info.lags == (1, 2, 4, 8)
    for j, lag in enumerate(info.lags):
        values = [frame[(frame["layer"] == i) & (frame["lag"] == lag)]["mean"].item() for i in range(5)]
        np.testing.assert_allclose(info.overlap[:, j], values)
        assert info.mean[j] == pytest.approx(sum(values) / 5)
        assert info.high[j] - info.mean[j] == pytest.approx(0.1)


def test_drift_of_one_sample_has_no_band() -> None:
    frame = drift_frame(3).assign(low=np.nan, high=np.nan)
    figure = plots.step_drift(plots.drift_info(frame))
    assert not figure.axes[0].collections


def test_window_needed_is_the_first_that_holds_enough() -> None:
    frame = window_frame(6)
    for level in (0.3, 0.95, 1.0):
        info = plots.window_info(frame, level)
        assert info.rows == "generated tokens"
        for layer, needed in zip(info.layers, info.needed, strict=True):
            part = frame[(frame["layer"] == layer) & (frame["phase"] == "decode")]
            enough = [
                d for d, held in zip(part["distance"], part["mean"], strict=True) if held >= level - 1e-9
            ]
            assert needed == min(enough)
        first = frame[(frame["layer"] == 0) & (frame["phase"] == "decode")]
        np.testing.assert_allclose(info.low[0], first["low"])
        np.testing.assert_allclose(info.high[0], first["high"])
    never = plots.window_info(frame.assign(mean=frame["mean"] * 0.5))
    assert np.isnan(never.needed).all()
    assert isinstance(plots.text_window(never), Figure)


def test_window_falls_back_on_the_last_prompt_row() -> None:
    frame = window_frame(2)
    assert plots.window_info(frame[frame["phase"] == "prefill"]).rows == "last prompt token"


def test_policy_panels_are_the_policy() -> None:
    tuned, shared, joint = plots.policy_layers_info(policies(3)).panels
    assert tuned.keep == (0.25, 0.5, 0.75)
    assert tuned.compute == (0.125, 0.25, 0.375)
    assert tuned.text == (10.0, 11.0, 12.0)
    assert not tuned.text_share
    assert (shared.text, shared.text_share) == ((0.3, 0.3, 0.3), True)
    assert (joint.keep, joint.joint, joint.text) == ((0.4, 0.4, 0.4), True, None)
    assert plots.policy_layers_info(Policy(name="u", vision_keep=0.2)).scalar
    assert not plots.policy_layers_info(Policy(name="u", vision_keep=0.2), layers=4).scalar
    half = Policy(vision_keep=0.2, pictures=PicturePolicy(kind="pooled", share=0.5))
    panels = plots.policy_layers_info([half, half.of_cache]).panels
    assert [panel.shown for panel in panels] == [0.5, None]
    labels = [ax.get_ylabel() for ax in plots.policy_layers([half, half.of_cache]).axes]
    assert labels == ["Vision KV of pictures\nmade smaller, to 50%", "Vision KV"]


def test_policies_of_other_depths_are_refused() -> None:
    with pytest.raises(UserError, match="written for 3 layers, the model has 6"):
        plots.policy_layers([policies(6)[0], policies(3)[0]])
    with pytest.raises(UserError, match="at least one policy"):
        plots.policy_layers([])


def test_pareto_lines_and_front() -> None:
    frame = pareto_frame()
    info = plots.pareto_info(frame)
    assert info.dense == (0.8, 0.75, 0.85)
    rest = frame[frame["family"] != "dense"]
    assert {line.family for line in info.lines} == set(rest["family"])
    for line in info.lines:
        assert list(line.cost) == sorted(line.cost)
        for policy, cost, score, best in zip(line.policies, line.cost, line.score, line.front, strict=True):
            row = rest[rest["policy"] == policy].iloc[0]
            assert (cost, score) == (row["live_share"], row["score"])
            beaten = False
            for other in rest.itertuples():
                no_worse = other.live_share <= cost and other.score >= score
                beaten |= no_worse and (other.live_share < cost or other.score > score)
            assert best == (not beaten)


def test_a_hair_cheaper_is_not_cheaper() -> None:
    assert unbeaten(np.array([0.2, 0.1998]), np.array([0.9, 0.5])) == [True, False]
    assert unbeaten(np.array([0.2, 0.1]), np.array([0.9, 0.5])) == [True, True]
    assert unbeaten(np.array([0.2, 0.2]), np.array([0.5, 0.5])) == [True, True]


def test_pareto_without_dense_or_with_dense_alone() -> None:
    frame = pareto_frame()
    assert plots.pareto_info(frame[frame["family"] != "dense"]).dense is None
    assert isinstance(plots.pareto_front(frame[frame["family"] == "dense"]), Figure)


def test_heat_panels_keep_order_and_state_their_peak() -> None:
    scores = np.random.default_rng(1).random((20, 12)) + 0.01
    info = plots.vision_heatmap_info(picture(), scores, over(3, 4))
    assert len(info.panels) == 12
    assert info.panels[0].title == "Layer 0"
    assert info.panels[-1].title == "Layer 19"
    assert info.pictures[0].shape == (32, 48, 3)
    for panel in info.panels:
        row = scores[int(panel.title.split()[1])]
        for i, j in itertools.product(range(3), range(4)):
            assert panel.weights[0][i, j] == pytest.approx(row[4 * i + j] / max(row))
        assert panel.peak == pytest.approx(max(row) / sum(row))


def test_heatmap_of_a_layer_that_never_looks() -> None:
    info = plots.vision_heatmap_info(picture(), np.zeros((1, 4)), over(2, 2))
    assert info.panels[0].peak == 0.0
    assert (info.panels[0].weights[0] == 0.0).all()
    assert isinstance(plots.vision_heatmap(picture(), np.zeros((1, 4)), over(2, 2)), Figure)


def test_heat_of_overlapping_tiles_adds_up_and_leaves_newlines_out() -> None:
    """An overview of 2 x 2 and, over the left half, 2 x 2 with a newline behind each row."""
    tiles = ((Tile(0, 2, 2, 2), Tile(4, 2, 2, 3, (0.0, 0.0, 0.5, 1.0))),)
    scores = np.random.default_rng(6).random((1, 10))
    (panel,) = plots.vision_heatmap_info(picture(), scores, tiles).panels
    row = scores[0]
    fine = np.array([[row[4], row[5], 0, 0], [row[7], row[8], 0, 0]])
    coarse = np.array([[row[0], row[0], row[1], row[1]], [row[2], row[2], row[3], row[3]]]) / 2
    wanted = fine + coarse
    np.testing.assert_allclose(panel.weights[0], wanted / wanted.max())
    assert panel.peak == pytest.approx(np.delete(row, [6, 9]).max() / row.sum())
    assert panel.unplaced == pytest.approx((row[6] + row[9]) / row.sum())
    info = plots.vision_heatmap_info(picture(), scores, tiles)
    assert f"newline tokens, not drawn, hold {panel.unplaced:.1%}" in info.note


def test_heat_of_several_pictures_is_on_one_scale() -> None:
    """A picture without tiles of its own (a frame that shares another's) is left out."""
    tiles = (grid(2, 2).tiles, (), tuple(tile.behind(4) for tile in grid(1, 2).tiles))
    pictures = [picture(), picture().rotate(90), picture().resize((20, 40))]
    scores = np.array([[1.0, 2.0, 3.0, 4.0, 8.0, 6.0]])
    info = plots.vision_heatmap_info(pictures, scores, tiles)
    assert [found.shape[:2] for found in info.pictures] == [(32, 48), (40, 20)]
    first, second = info.panels[0].weights
    np.testing.assert_allclose(first, np.array([[1, 2], [3, 4]]) / 8)
    np.testing.assert_allclose(second, [[1.0, 0.75]])
    assert isinstance(plots.vision_heatmap(pictures, scores, tiles), Figure)
    words = plots.word_heatmaps_info(pictures, scores[None], tiles, ["word"])
    np.testing.assert_allclose(words.panels[0].weights[1], second)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_pictures_on_a_panel_keep_their_shape_and_do_not_touch(count: int) -> None:
    random = np.random.default_rng(count)
    sizes = [(int(w), int(h)) for w, h in random.integers(20, 90, (count, 2))]
    placed = arrange(sizes)
    for (width, height), (left, right, bottom, top) in zip(sizes, placed.extents, strict=True):
        assert (right - left) / (bottom - top) == pytest.approx(width / height)
        assert left >= 0
        assert top >= 0
        assert right <= placed.width + 1e-9
        assert bottom <= placed.height + 1e-9
    for one, other in itertools.combinations(placed.extents, 2):
        assert one[1] < other[0] or other[1] < one[0] or one[2] < other[3] or other[2] < one[3]


def test_word_panels_average_steps_and_layers() -> None:
    scores = np.random.default_rng(2).random((4, 3, 6))
    info = plots.word_heatmaps_info(picture(), scores, over(2, 3), ["one", "two"], steps=[[0], [1, 3]])
    mean = (scores[1] + scores[3]).mean(axis=0) / 2
    np.testing.assert_allclose(info.panels[1].weights[0].ravel(), mean / mean.max())
    single = plots.word_heatmaps_info(picture(), scores, over(2, 3), list("abcd"), layer=2)
    np.testing.assert_allclose(single.panels[3].weights[0].ravel(), scores[3, 2] / scores[3, 2].max())
    many = plots.word_heatmaps_info(picture(), np.ones((40, 1, 6)), over(2, 3), ["w"] * 40)
    assert len(many.panels) == 23
    assert many.note == "first 23 of 40 words; mean of 1 layers"
    assert info.note == "all 2 words; mean of 3 layers and of a word's tokens"


def test_head_panels_are_one_layers_heads_behind_their_mean() -> None:
    scores = np.random.default_rng(3).random((3, 4, 6)) / 6
    scores[1] += 0.1
    scores[0, 2] = 0.0
    info = plots.head_heatmaps_info(picture(), scores, over(2, 3), kv_heads=2)
    assert info.title == "Where the heads of layer 1 look", "it looks at the picture most"
    assert info.note == "all 4 heads, each 2 in a row share a KV head"
    assert info.beside == "mass"
    assert [panel.title for panel in info.panels] == ["Mean", "Head 0", "Head 1", "Head 2", "Head 3"]
    mean = sum(scores[1, head] for head in range(4)) / 4
    for panel, row in zip(info.panels, [mean, *scores[1]], strict=True):
        np.testing.assert_allclose(panel.weights[0].ravel(), row / max(row))
        assert panel.mass == pytest.approx(sum(row))
    blind = plots.head_heatmaps_info(picture(), scores, over(2, 3), layer=0, heads=[2, 0])
    assert [panel.title for panel in blind.panels] == ["Mean", "Head 2", "Head 0"]
    assert blind.panels[1].mass == 0.0
    assert not blind.panels[1].weights[0].any()
    said = [ax.get_title(loc="right") for ax in plots.head_heatmaps(picture(), scores, over(2, 3), 0).axes]
    assert said[4] == "0.0%"
    assert said[2] == f"{scores[0, 0].sum():.0%}"
    many = plots.head_heatmaps_info(picture(), np.ones((1, 64, 6)), over(2, 3))
    titles = [panel.title for panel in many.panels]
    assert (len(titles), titles[1], titles[-1]) == (39, "Head 0", "Head 63")
    assert many.note == "38 of 64 heads"


def test_words_are_grouped_at_spaces() -> None:
    words, places = plots.group_words(["▁a", "▁blue", "▁tri", "angle", ",", "Ġ", "C", "K", " end"])
    assert words == ["a", "blue", "triangle,", "CK", "end"]
    assert places == [[0], [1], [2, 3, 4], [5, 6, 7], [8]]
    assert plots.group_words([]) == ([], [])


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "[SEP]"])
def test_tokens_that_end_an_answer_are_no_words(end: str) -> None:
    assert plots.group_words(["▁at", "▁left", ".", end]) == (["at", "left."], [[0], [1, 2]])
    assert plots.group_words(["▁a", "▁<", "▁b", end, end]) == (["a", "<", "b"], [[0], [1], [2]])
    assert plots.group_words([end, "▁a"])[0][-1] == "a", "only at the end"


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_best_so_far_counts_complete_trials_alone(direction: str) -> None:
    frame = trials_frame()
    info = plots.trial_history_info(frame, direction)  # type: ignore[arg-type]
    better = min if direction == "minimize" else max
    seen: list[float] = []
    for row in frame.sort_values("trial").itertuples():
        if row.state == "COMPLETE":
            seen.append(row.value)
            assert info.best[len(seen) - 1] == better(seen)
    assert len(info.complete) == len(seen)
    assert frame.set_index("trial")["value"][info.best_trial] == better(seen)
    assert set(info.failed) == set(frame[frame["state"] == "FAIL"]["trial"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plots.coverage_info(coverage_frame(2).iloc[:0]), "no traced sample has vision tokens"),
        (lambda: plots.overlap_info(overlap_frame(2).iloc[:0]), "no traced sample has vision tokens"),
        (lambda: plots.drift_info(drift_frame(2).iloc[:0]), "longer answers"),
        (lambda: plots.mass_info(mass_frame(2).iloc[:0]), "trace some samples first"),
        (lambda: plots.sink_info(sink_frame(2).query("query == 'text'")), "trace some samples first"),
        (lambda: plots.head_info(head_frame(2).iloc[:0]), "trace with --per-head"),
        (lambda: plots.diff_info(diff_frame(2).query("statistic == 'mass_sink'")), "no statistic in common"),
        (
            lambda: plots.horizon_info(vision_frame(2).iloc[:0], horizon_frame(2), 0.01),
            "no traced sample has vision tokens",
        ),
        (lambda: plots.mass_info(mass_frame(2).drop(columns="modality")), "needs the column 'modality'"),
        (lambda: plots.vision_heatmap(picture(), np.zeros((2, 0)), over(0, 0)), "vision tokens"),
        (
            lambda: plots.vision_heatmap(picture(), np.ones((2, 6)), over(3, 3)),
            "vision token 8, but there are 6",
        ),
        (lambda: plots.vision_heatmap(picture(), np.ones((2, 6)), ()), "not known"),
        (
            lambda: plots.vision_heatmap([picture()] * 2, np.ones((2, 4)), over(2, 2)),
            "each of the 2 pictures, got 1",
        ),
        (lambda: plots.vision_heatmap(picture(), np.ones((2, 4)), over(2, 2), [2]), "0 to 1, got 2"),
        (lambda: plots.vision_heatmap(picture(), np.ones((2, 4)), over(2, 2), []), "at least one layer"),
        (lambda: plots.word_heatmaps(picture(), np.ones((2, 1, 0)), over(0, 0), ["a", "b"]), "vision tokens"),
        (
            lambda: plots.word_heatmaps(picture(), np.ones((2, 1, 4)), over(2, 2), ["a"]),
            "each of the 2 scored steps",
        ),
        (
            lambda: plots.word_heatmaps(picture(), np.ones((2, 1, 4)), over(2, 2), ["a"], steps=[[5]]),
            "0 to 1.*got 5",
        ),
        (
            lambda: plots.word_heatmaps(picture(), np.ones((2, 1, 4)), over(2, 2), ["a", "b"], layer=1),
            "got 1",
        ),
        (lambda: plots.head_overlap_info(head_overlap_frame(2).iloc[:0]), "vision tokens"),
        (lambda: plots.head_overlap_info(head_overlap_frame(2, heads=1)), "a layer has one head"),
        (
            lambda: plots.head_heatmaps(picture(), np.ones((2, 4)), over(2, 2)),
            "got 2 dimensions; trace with --per-head",
        ),
        (lambda: plots.head_heatmaps(picture(), np.ones((2, 3, 4)), over(2, 2), 2), "0 to 1, got 2"),
        (
            lambda: plots.head_heatmaps(picture(), np.ones((2, 3, 4)), over(2, 2), heads=[0, 3]),
            "0 to 2, got 3",
        ),
        (
            lambda: plots.head_heatmaps(picture(), np.ones((2, 3, 4)), over(2, 2), kv_heads=2),
            "divide the 3 query heads, got 2",
        ),
        (lambda: plots.trial_history(trials_frame().assign(state="FAIL")), "needs a complete trial"),
        (lambda: plots.pareto_info(pareto_frame(), "read_share"), "needs the column 'read_share'"),
        (lambda: plots.save_figure(Figure(), "x.gif"), r"must end in .png, .svg or .pdf, got '.gif'"),
        (lambda: plots.save_figure(Figure(), "x.png", "gif"), r"must be one of png, svg, pdf, got 'gif'"),
    ],
)
def test_bad_input_is_one_sentence(call: object, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        call()  # type: ignore[operator]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("suffix", "start"), FORMATS)
def test_saved_figures_are_whole_and_repeatable(tmp_path: Path, suffix: str, start: bytes) -> None:
    paths = [tmp_path / "a" / f"one.{suffix}", tmp_path / f"two.{suffix}"]
    for path in paths:
        assert plots.save_figure(plots.text_window(plots.window_info(window_frame(2))), path) == path
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(start)
    assert first == second
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [f"one.{suffix}", f"two.{suffix}"]


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    class Broken(Figure):
        def savefig(self, *args: object, **options: object) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        plots.save_figure(Broken(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.full
def test_a_notebook_can_show_a_figure() -> None:
    figure = plots.trial_history(trials_frame())
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def fail_inside_the_theme() -> None:
    with theme():
        assert mpl.rcParams["font.size"] == 14
        raise ValueError("inside")


def test_the_theme_ends_even_on_errors() -> None:
    with pytest.raises(ValueError, match="inside"):
        fail_inside_the_theme()
    assert settings() == SETTINGS


def test_layers_have_their_own_colours() -> None:
    for count in DEPTHS:
        assert len(set(layer_colours(range(count)))) == count


# -- what figures say about intervals and counts ----------------------------------------------


def spread(frame: pd.DataFrame, half: float, worst: float) -> pd.DataFrame:
    """The frame with intervals of one half width, but for the last row, whose is much wider."""
    halves = np.full(len(frame), half)
    halves[-1] = worst
    return frame.assign(low=frame["mean"] - halves, high=frame["mean"] + halves)


@pytest.mark.full
def test_maps_say_how_wide_their_widest_interval_is() -> None:
    """Maps once said what is typical, ±0.2 points, where a cell was off by ±11."""
    heads = spread(head_frame(3).sort_values(["phase", "statistic"], ascending=[False, True]), 0.002, 0.11)
    said = words_of(plots.head_maps(plots.head_info(heads)))
    assert "95% intervals: ±0.2 points in the median, ±11 at worst" in said
    assert "95% intervals: ±0.2 points\n" in said, "the other map has no such cell"
    nat = words_of(plots.head_maps(plots.head_info(spread(heads, 0.02, 0.02), ("entropy",))))
    assert "95% intervals: ±0.02 nat\n" in nat
    tiny = words_of(plots.head_maps(plots.head_info(spread(heads, 1e-7, 1.0))))
    assert "below ±0.01 points in the median, ±100 at worst" in tiny
    layers = spread(overlap_frame(4).sort_values(["query", "layer_b", "layer_a"]), 0.002, 0.11)
    layers.iloc[-2, layers.columns.get_indexer(["low", "high"])] = [-1.0, 1.0]
    assert "±0.2 points in the median, ±100 at worst" in words_of(
        plots.layer_overlap(plots.overlap_info(layers))
    )
    shared = spread(head_overlap_frame(3).query("query == 'step'").sort_values("layer_b"), 0.002, 0.002)
    wide = shared["head_b"].eq(-1) & shared["layer_a"].eq(1) & shared["layer_b"].eq(1)
    shared.loc[shared.index[wide][0], ["low", "high"]] = [0.0, 0.3]
    assert "±15 at worst" in words_of(plots.head_overlap(plots.head_overlap_info(shared)))


@pytest.mark.full
def test_lines_without_bands_say_how_wide_the_intervals_are() -> None:
    for draw, info, frame in (
        (plots.coverage_curves, plots.coverage_info, coverage_frame),
        (plots.text_window, plots.window_info, window_frame),
    ):
        wide = frame(12).sort_values("query", ascending=False, kind="stable")
        wide.iloc[-1, wide.columns.get_indexer(["low", "high"])] = [0.0, 0.5]
        assert "±10 points in the median, ±25 at worst" in words_of(draw(info(wide)))
        assert "bands: 95% interval" in words_of(draw(info(frame(3))))


@pytest.mark.full
def test_intervals_that_are_not_known_are_not_promised() -> None:
    figures = (
        plots.sink_mass(plots.sink_info(sink_frame(2).assign(low=np.nan, high=np.nan))),
        plots.coverage_curves(plots.coverage_info(coverage_frame(2).assign(low=np.nan, high=np.nan))),
        plots.text_window(plots.window_info(window_frame(2).assign(low=np.nan, high=np.nan))),
        plots.step_drift(plots.drift_info(drift_frame(2).assign(low=np.nan, high=np.nan))),
        plots.layer_diff(plots.diff_info(diff_frame(2).assign(low=np.nan, high=np.nan))),
        plots.head_maps(plots.head_info(head_frame(2).assign(low=np.nan, high=np.nan))),
        plots.layer_overlap(plots.overlap_info(overlap_frame(3).assign(low=np.nan, high=np.nan))),
        plots.vision_horizon(
            plots.horizon_info(vision_frame(2).assign(low=np.nan, high=np.nan), horizon_frame(2), 0.01)
        ),
    )
    for figure in figures:
        assert "interval" not in words_of(figure), figure.get_suptitle()


def test_numbers_of_samples_that_differ_are_given_as_a_range() -> None:
    frame = mass_frame(3)
    frame["n"] = [5, *[7] * (len(frame) - 1)]
    assert plots.mass_info(frame).note == "mean over 5 to 7 samples"
    differences = diff_frame(2)
    differences["n"] = [1000, *[1200] * (len(differences) - 1)]
    assert plots.diff_info(differences).how == "1,000 to 1,200 samples, each against itself"
    costs = pareto_frame()
    costs["n"] = [30, *[32] * (len(costs) - 1)]
    assert plots.pareto_info(costs).note.startswith("n = 30 to 32 samples")
    assert plots.budgets_info(budgets_frame().assign(samples=range(20, 28))).samples == "20 to 27"
    assert plots.budget_front_info(equal_bytes().assign(samples=range(9, 18))).samples == "9 to 17"


def test_newline_tokens_of_the_panels_are_given_as_a_range() -> None:
    tiles = ((Tile(0, 2, 2, 3),),)
    scores = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 4, 1, 1, 0]], dtype=float)
    info = plots.vision_heatmap_info(picture(), scores, tiles)
    assert info.note == "all 2 layers; newline tokens, not drawn, hold 0.0% to 50.0% of a panel"


def test_a_layer_that_never_looks_keeps_its_row_in_both_maps() -> None:
    """Without a row of its own the layers behind it stood under the numbers of others."""
    frame = head_overlap_frame(16, heads=3)
    inside = (frame["layer_a"] == 2) & (frame["layer_b"] == 2) & (frame["head_b"] >= 0)
    info = plots.head_overlap_info(frame[~inside])
    shared, others = info.maps
    assert shared.layers == others.layers == tuple(range(16))
    assert np.isfinite(shared.values[2]).all()
    assert np.isnan(others.values[2]).all()
    figure = plots.head_overlap(info)
    for one, ax in zip(info.maps, figure.axes, strict=False):
        mesh = next(group for group in ax.collections if isinstance(group, QuadMesh))
        np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), one.values)
    assert "hatched: nothing was measured" in words_of(figure)
    assert "hatched" not in words_of(every_figure(6)["head overlap"])
    assert "hatched: a layer with itself" in words_of(every_figure(6)["overlap"])
    left = figure.axes[0]
    for tick, text in zip(left.get_yticks(), left.get_yticklabels(), strict=True):
        assert shared.layers[int(tick)] == int(text.get_text()), "a row stands beside its own number"


def test_a_colour_is_one_layer_in_every_panel_of_coverage() -> None:
    frame = coverage_frame(6)
    info = plots.coverage_info(frame[~((frame["query"] == "step") & (frame["layer"] == 0))])
    assert {panel.layers for panel in info.panels} == {tuple(range(6))}
    step = next(panel for panel in info.panels if panel.title == "One decoding step")
    assert np.isnan(step.attention[0]).all()
    assert np.isfinite(step.attention[1:]).all()


@pytest.mark.parametrize("size", few([6, 32, 40], [32]))
def test_maps_are_never_crowded(size: int) -> None:
    figure = plots.head_maps(plots.head_info(head_frame(size, heads=size)))
    FigureCanvasAgg(figure).draw()
    for number, ax in enumerate(figure.axes[:2]):
        for axis, side in ((ax.xaxis, "x"), (ax.yaxis, "y"))[: 2 - number]:  # layers stand at the left alone
            labels = [text for text in axis.get_ticklabels() if text.get_text()]
            assert 2 <= len(labels) <= 9
            ends = sorted((getattr(b, f"{side}0"), getattr(b, f"{side}1"))
                          for b in (text.get_window_extent() for text in labels))  # fmt: skip
            assert all(one[1] < other[0] for one, other in itertools.pairwise(ends))
        assert len(ax.texts) == (size**2 + 1 if size <= 12 else 1), "numbers, and the line on intervals"


# -- what pictures are of ---------------------------------------------------------------------


def test_heatmaps_say_sample_prompt_and_rows() -> None:
    scores = np.random.default_rng(9).random((3, 2, 12))
    short = plots.Caption("s3", "What is\nthis?", "the last prompt token")
    told_apart = "Sample s3 · prompt: “What is this?” · attention of "
    heat = plots.vision_heatmap(picture(), scores[0], over(3, 4), caption=short)
    heads = plots.head_heatmaps(picture(), scores, over(3, 4), caption=short)
    for figure in (heat, heads):
        assert f"{told_apart}the last prompt token" in words_of(figure)
    words = plots.word_heatmaps(
        picture(), scores, over(3, 4), list("abc"), caption=plots.Caption("s3", "What?")
    )
    assert "Sample s3 · prompt: “What?” · attention of the rows that write each word" in words_of(words)
    bare = plots.word_heatmaps(picture(), scores, over(3, 4), list("abc"))
    assert "attention of the rows that write each word" in words_of(bare)
    assert "all 2 layers" in words_of(heat)
    assert "2 heads" in words_of(heads)


@pytest.mark.full  # every figure is drawn twice
def test_long_prompts_are_cut_and_stand_below_the_title() -> None:
    for name in ("heatmap", "words", "head heatmaps"):
        figure = drawn_figures(6)[name]
        title = figure._suptitle  # type: ignore[attr-defined]
        (subtitle,) = (text for text in figure.texts if "prompt" in text.get_text())
        assert "…”" in subtitle.get_text()
        assert "$5" in subtitle.get_text()
        assert title.get_window_extent().y0 >= subtitle.get_window_extent().y1 - 1
        top = max(ax._left_title.get_window_extent().y1 for ax in figure.axes if ax._left_title.get_text())
        assert subtitle.get_window_extent().y0 >= top - 1


@pytest.mark.full
def test_twenty_three_of_thirty_words_are_said_to_be_so() -> None:
    scores = np.random.default_rng(1).random((30, 2, 6))
    figure = plots.word_heatmaps(picture(), scores, over(2, 3), [f"w{i}" for i in range(30)])
    assert "first 23 of 30 words" in words_of(figure)
    steps = [[i] for i in range(30)]
    part = plots.word_heatmaps_info(picture(), scores, over(2, 3), ["w"] * 20, steps=steps[:20])
    assert "first 20 words, 10 more tokens of the answer are not drawn" in part.note
    ended = plots.word_heatmaps_info(picture(), scores[:21], over(2, 3), ["w"] * 20, steps=steps[:20])
    assert ended.note.startswith("all 20 words"), "the last step is that of the end token"


# -- seaborn, settings, files -----------------------------------------------------------------


@pytest.mark.full  # every figure
def test_each_figure_leaves_the_settings_as_they_were() -> None:
    with mpl.rc_context({"font.size": 9.0, "axes.grid": False, "lines.linewidth": 5.0}):
        mine = settings()
        for draw in (
            lambda: plots.modality_mass(plots.mass_info(mass_frame(2))),
            lambda: plots.vision_horizon(plots.horizon_info(vision_frame(2), horizon_frame(2), 0.01)),
            lambda: plots.sink_mass(plots.sink_info(sink_frame(2))),
            lambda: plots.head_maps(plots.head_info(head_frame(2))),
            lambda: plots.head_overlap(plots.head_overlap_info(head_overlap_frame(2))),
            lambda: plots.head_heatmaps(picture(), np.ones((1, 2, 4)), over(2, 2)),
            lambda: plots.layer_diff(plots.diff_info(diff_frame(2))),
            lambda: plots.coverage_curves(plots.coverage_info(coverage_frame(2))),
            lambda: plots.layer_overlap(plots.overlap_info(overlap_frame(2))),
            lambda: plots.step_drift(plots.drift_info(drift_frame(2))),
            lambda: plots.text_window(plots.window_info(window_frame(2))),
            lambda: plots.policy_layers(policies(2)),
            lambda: plots.pareto_front(pareto_frame()),
            lambda: plots.budget_front(equal_bytes()),
            lambda: plots.quality_by_budget(budgets_frame()),
            lambda: plots.vision_heatmap(picture(), np.ones((1, 4)), over(2, 2)),
            lambda: plots.word_heatmaps(picture(), np.ones((1, 1, 4)), over(2, 2), ["a"]),
            lambda: plots.trial_history(trials_frame()),
            lambda: plots.knob_effects(knobs_frame()),
            lambda: plots.parameter_importances(importances_frame()),
        ):
            figure = draw()
            assert settings() == mine, figure.get_suptitle()
    assert plt.get_fignums() == []


FRESH = """
import sys
from avlprof import plots
plots.save_figure
assert not {"matplotlib", "pandas", "seaborn"} & set(sys.modules), "a name costs nothing"
plots.mass_info, plots.window_info
assert not {"matplotlib.pyplot", "seaborn"} & set(sys.modules), "information needs no seaborn"
import matplotlib as mpl
before = {name: value for name, value in mpl.rcParams.items() if not name.startswith("backend")}
import numpy as np
info = plots.ImportanceInfo(("a", "b"), np.array([0.7, 0.3]), np.array([0.6, 0.2]), np.array([0.8, 0.4]), 9)
figure = plots.parameter_importances(info)
assert "seaborn" in sys.modules
after = {name: value for name, value in mpl.rcParams.items() if not name.startswith("backend")}
assert after == before
assert not sys.modules["matplotlib.pyplot"].get_fignums()
assert set(plots.__all__) <= set(dir(plots))
for name in plots.__all__:
    assert callable(getattr(plots, name)), name
"""


@pytest.mark.full  # a process of its own
def test_seaborn_is_loaded_by_who_draws_and_changes_no_setting() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_look_is_seaborns() -> None:
    import seaborn as sns

    with theme():
        for name, value in sns.axes_style("whitegrid").items():
            if name not in THEME:
                assert mpl.rcParams[name] == value, name
        assert mpl.rcParams["axes.grid"]


def test_a_gap_in_a_line_stays_a_gap() -> None:
    """Seaborn leaves missing points out, which draws a line across them."""
    frame = sink_frame(5)
    figure = plots.sink_mass(plots.sink_info(frame[frame["layer"] != 2].assign(n=7)))
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [4, 4]
    holed = frame.copy()
    holed.loc[(holed["layer"] == 2) & (holed["sink"] == "first"), "mean"] = np.nan
    line = plots.sink_mass(plots.sink_info(holed)).axes[0].lines[0]
    assert np.isnan(line.get_ydata()[2])
    assert np.isfinite(np.delete(line.get_ydata(), 2)).all()
    drift = drift_frame(4)
    drift.loc[((drift["layer"] == 1) & (drift["lag"] == 4)) | (drift["layer"] == 2), "mean"] = np.nan
    lines = plots.step_drift(plots.drift_info(drift)).axes[0].lines
    assert [int(np.isnan(line.get_ydata()).sum()) for line in lines[:3]] == [0, 1, 0]
    np.testing.assert_array_equal(lines[2].get_ydata(), plots.drift_info(drift).overlap[3])


@pytest.mark.parametrize(("suffix", "start"), FORMATS)
def test_a_format_replaces_that_of_the_name(tmp_path: Path, suffix: str, start: bytes) -> None:
    figure = plots.knob_effects(knobs_frame())
    for name in ("knobs.png", "front-0.2", "plain"):
        path = plots.save_figure(figure, tmp_path / name, suffix)
        assert path.name == f"{name.removesuffix('.png')}.{suffix}"
        assert path.read_bytes().startswith(start)
        assert plots.figure_path(tmp_path / name, suffix) == path
