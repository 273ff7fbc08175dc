"""Frames as a profile has them, made of random numbers, and every figure of them."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from avlprof import plots
from avlprof.models.tiles import Tile, grid
from avlprof.plots.style import MODALITY_COLOURS
from avlprof.policy import JointPool, Policy, TextPolicy

CAPTION = plots.Caption("s17", "What is left of the $5 note?\n" + "Look well. " * 30, "the last prompt token")


def over(rows: int, columns: int) -> tuple[tuple[Tile, ...], ...]:
    """One picture under one grid of tokens."""
    return (grid(rows, columns).tiles,)


def measured(rows: list[tuple], columns: list[str], seed: int = 0) -> pd.DataFrame:
    """A shuffled frame with a random mean, an interval around it and 7 samples a row."""
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(rows, columns=columns)
    frame["mean"] = random.random(len(frame))
    frame["low"], frame["high"], frame["n"] = frame["mean"] - 0.1, frame["mean"] + 0.1, 7
    return frame.sample(frac=1.0, random_state=seed)


def mass_frame(layers: int) -> pd.DataFrame:
    kinds = [("prefill", "text"), ("prefill", "last"), ("decode", "generated")]
    rows = [(layer, *kind, name) for layer in range(layers) for kind in kinds for name in MODALITY_COLOURS]
    frame = measured(rows, ["layer", "phase", "query", "modality"])
    frame.loc[(frame["phase"] == "prefill") & (frame["modality"] == "generated"), "mean"] = 0.0
    frame["mean"] /= frame.groupby(["layer", "phase", "query"])["mean"].transform("sum")
    return frame


def coverage_frame(layers: int) -> pd.DataFrame:
    queries = ("last", "instruction", "step", "answer")
    rows = [(layer, query, kept / 9) for layer in range(layers) for query in queries for kept in range(1, 10)]
    return measured(rows, ["layer", "query", "share_kept"])


def overlap_frame(layers: int) -> pd.DataFrame:
    rows = list(itertools.product(range(layers), range(layers), ("last", "step")))
    return measured(rows, ["layer_a", "layer_b", "query"])


def drift_frame(layers: int) -> pd.DataFrame:
    return measured(list(itertools.product(range(layers), (1, 2, 4, 8))), ["layer", "lag"])


def window_frame(layers: int) -> pd.DataFrame:
    kinds = [("decode", "generated"), ("prefill", "last"), ("prefill", "text")]
    rows = [(layer, *kind, d) for layer in range(layers) for kind in kinds for d in (1, 2, 3, 8, 64, 70)]
    frame = measured(rows, ["layer", "phase", "query", "distance"]).sort_values("distance")
    frame["mean"] = frame.groupby(["layer", "phase", "query"])["mean"].cumsum()
    frame["mean"] /= frame.groupby(["layer", "phase", "query"])["mean"].transform("max")
    return frame


def sink_frame(layers: int) -> pd.DataFrame:
    kinds = [("decode", "generated"), ("prefill", "last"), ("prefill", "text")]
    rows = [(layer, *kind, sink) for layer in range(layers) for kind in kinds for sink in ("first", "text")]
    return measured(rows, ["layer", "phase", "query", "sink"])


def vision_frame(layers: int) -> pd.DataFrame:
    queries = ("system", "text", "last", "generated")
    return measured(list(itertools.product(range(layers), queries)), ["layer", "query"])


def horizon_frame(layers: int) -> pd.DataFrame:
    """None for text, a sure one for the last row, one that may be none for generated rows."""
    rows = [("text", None, None, None), ("last", layers // 2, 0, layers // 2), ("generated", 0, 0, None)]
    rows.append(("any", None, None, None))
    frame = pd.DataFrame(rows, columns=["query", "layer", "low", "high"])
    return frame.astype({name: "Int64" for name in ("layer", "low", "high")})


def head_frame(layers: int, heads: int = 4) -> pd.DataFrame:
    kinds = [("decode", "generated"), ("prefill", "last")]
    names = ("vision", "sink", "entropy")
    rows = [
        (i, j, *kind, name) for i in range(layers) for j in range(heads) for kind in kinds for name in names
    ]
    return measured(rows, ["layer", "head", "phase", "query", "statistic"])


def head_overlap_frame(layers: int, heads: int = 4) -> pd.DataFrame:
    numbers = range(heads)
    sides = [(i, a, i, b) for i in range(layers) for a in numbers for b in numbers]
    sides += [(i, a, j, -1) for i in range(layers) for a in numbers for j in range(layers)]
    rows = [(*side, query) for side in sides for query in ("last", "step")]
    return measured(rows, ["layer_a", "head_a", "layer_b", "head_b", "query"])


def diff_frame(layers: int) -> pd.DataFrame:
    queries = (("prefill", "last"), ("decode", "generated"))
    names = ("mass_vision", "coverage_90", "overlap_8", "window_95", "entropy", "mass_sink")
    rows = [(i, *query, name) for i in range(layers) for query in queries for name in names]
    frame = measured(rows, ["layer", "phase", "query", "statistic"], seed=4)
    frame["mean"] -= 0.5
    frame["low"], frame["high"] = frame["mean"] - 0.2, frame["mean"] + 0.2
    return frame.assign(n_other=7, how="paired")


ROUTES = ("question-to-vision", "answer-to-vision", "answer-to-question")


def knockout_frame(layers: int, heads: int = 4) -> pd.DataFrame:
    """Whole layers, all of them at once (-1), and single heads; what is lost falls with depth."""
    places = [(route, layer, -1) for route in ROUTES for layer in (*range(layers), -1)]
    places += [(route, layer, head) for route in ROUTES for layer in range(layers) for head in range(heads)]
    frame = pd.DataFrame(places, columns=["route", "layer", "head"])
    frame["kl"] = np.where(frame["layer"] < 0, 2.5, 0.5 ** (frame["layer"] + frame["head"] + 1.0))
    frame["kl_low"], frame["kl_high"] = frame["kl"] * 0.5, frame["kl"] * 1.5
    frame["first"] = np.where(frame["layer"] < 0, 0, frame["layer"])
    frame["last"] = np.where(frame["layer"] < 0, layers - 1, frame["layer"])
    frame["difference"] = -frame["kl"] / 3
    frame["difference_low"], frame["difference_high"] = frame["difference"] - 0.1, frame["difference"] + 0.1
    return frame.assign(samples=7).sample(frac=1.0, random_state=6).sort_values("route", kind="stable")


def beside_frames(layers: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A correlation for two routes, and the attention of each."""
    rows = pd.DataFrame({"route": ROUTES[:2], "attention": "generated rows (decode) on vision"})
    rows = rows.assign(rank_correlation=(-0.9, 0.2), low=(-1.0, -0.3), high=(-0.7, 0.5))
    return rows, measured(list(itertools.product(ROUTES, range(layers))), ["route", "layer"])


def pareto_frame() -> pd.DataFrame:
    random = np.random.default_rng(3)
    rows = [("dense", "dense", 1.0, 0.8, 0.75, 0.85, 32)]
    for family, cost in itertools.product(("tuned", "uniform", "random"), (0.1, 0.2, 0.5)):
        score = float(random.random())
        rows.append((f"{family}-{cost}", family, cost, score, score - 0.05, score + 0.05, 32))
    columns = ["policy", "family", "live_share", "score", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns).sample(frac=1.0, random_state=1)


def importances_frame() -> pd.DataFrame:
    shares = {"parameter": ["mix", "scorer"], "importance": [0.1, 0.9], "low": [0.0, 0.7], "high": [0.3, 1.0]}
    return pd.DataFrame(shares | {"trials": [34, 34]})


def knobs_frame() -> pd.DataFrame:
    values = {"knob": ["mix", "scorer"], "value": ["0.3", "pooled"], "plain": ["1", "last_query"]}
    return pd.DataFrame(values | {"change": [-0.01, 0.2], "low": [-0.02, 0.1], "high": [0.0, 0.3]})


def trials_frame(count: int = 30) -> pd.DataFrame:
    random = np.random.default_rng(5)
    state = random.choice(
        ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"], count, p=[0.5, 0.2, 0.1, 0.1, 0.1]
    )
    state[0] = "COMPLETE"
    value = np.where(np.isin(state, ["COMPLETE", "PRUNED"]), random.random(count), np.nan)
    return pd.DataFrame({"trial": range(count), "value": value, "state": state}).sample(
        frac=1.0, random_state=2
    )


def picture(width: int = 48, height: int = 32) -> Image.Image:
    colours = np.random.default_rng(7).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def policies(layers: int) -> list[Policy]:
    keep = tuple((i + 1) / (layers + 1) for i in range(layers))
    return [
        Policy(
            name="tuned",
            vision_keep=keep,
            vision_compute=tuple(share / 2 for share in keep),
            refresh_interval=4,
            text=TextPolicy(window=tuple(10 + i for i in range(layers)), sink=2),
        ),
        Policy(name="shared", vision_keep=0.5, text=TextPolicy(keep=0.3)),
        Policy(name="joint", pool="joint", joint=JointPool(keep=0.4)),
    ]


@functools.cache
def every_figure(layers: int, heads: int = 4) -> dict[str, Figure]:
    """A figure of every kind, for a model of so many layers and query heads."""
    scores = np.random.default_rng(9).random((5, layers, 12))
    return {
        "mass": plots.modality_mass(plots.mass_info(mass_frame(layers))),
        "horizon": plots.vision_horizon(
            plots.horizon_info(vision_frame(layers), horizon_frame(layers), 0.01)
        ),
        "sinks": plots.sink_mass(plots.sink_info(sink_frame(layers)), 4),
        "heads": plots.head_maps(plots.head_info(head_frame(layers, heads), ("vision", "sink", "entropy"))),
        "head overlap": plots.head_overlap(plots.head_overlap_info(head_overlap_frame(layers, heads), 0.1)),
        "head heatmaps": plots.head_heatmaps(
            picture(),
            np.random.default_rng(8).random((2, layers if heads == 4 else heads, 12)),
            over(3, 4),
            kv_heads=1,
            caption=CAPTION,
        ),
        "diff": plots.layer_diff(plots.diff_info(diff_frame(layers))),
        "coverage": plots.coverage_curves(plots.coverage_info(coverage_frame(layers))),
        "overlap": plots.layer_overlap(plots.overlap_info(overlap_frame(layers)), 0.1),
        "drift": plots.step_drift(plots.drift_info(drift_frame(layers)), 0.1),
        "window": plots.text_window(plots.window_info(window_frame(layers))),
        "policies": plots.policy_layers(policies(layers)),
        "policy": plots.policy_layers(Policy(name="uniform", vision_keep=0.2)),
        "pareto": plots.pareto_front(pareto_frame()),
        "front": plots.budget_front(equal_bytes()),
        "budgets": plots.quality_by_budget(budgets_frame()),
        "heatmap": plots.vision_heatmap(picture(), scores[0], over(3, 4), caption=CAPTION),
        "words": plots.word_heatmaps(picture(), scores, over(3, 4), list("abcde"), caption=CAPTION),
        "trials": plots.trial_history(trials_frame()),
        "first trial": plots.trial_history(trials_frame().sort_values("trial").head(1)),
        "knobs": plots.knob_effects(knobs_frame()),
        "importances": plots.parameter_importances(importances_frame()),
        "knockout": plots.knockout_map(knockout_frame(layers), "exact match on shapes (search)"),
        "knockout heads": plots.knockout_heads(knockout_frame(layers)),
        "knockout beside": plots.damage_beside_attention(knockout_frame(layers), *beside_frames(layers)),
    }


@functools.cache
def drawn_figures(layers: int) -> dict[str, Figure]:
    """Every figure after a first drawing, which settles where all stands."""
    for figure in every_figure(layers).values():
        FigureCanvasAgg(figure).draw()
    return every_figure(layers)


def all_text(figure: Figure) -> list[Text]:
    """Every text that says something: of the figure, its axes, their labels, notes and legends."""
    texts = [figure._suptitle, figure._supxlabel, *figure.texts]  # type: ignore[attr-defined]
    for legend in figure.legends:
        texts += legend.get_texts()
    for ax in figure.axes:
        right = ax._right_title  # type: ignore[attr-defined]
        texts += [ax._left_title, right, *ax.texts]  # type: ignore[attr-defined]
        texts += [ax.xaxis.label, ax.yaxis.label] if ax.axison else []
    return [text for text in texts if text is not None and text.get_text().strip()]


def equal_bytes(families: int = 4) -> pd.DataFrame:
    """Two budgets at which every family has the very same bytes and, but for a hair, scores."""
    rows = [("dense", "dense", 1.0, 0.9)]
    names = ["uniform", "tuned", "random", *(f"p{i}" for i in range(20))][:families]
    rows += [(f"{n}-{c}", n, c, c + i / 500) for i, n in enumerate(names) for c in (0.1, 0.2)]
    frame = pd.DataFrame(rows, columns=["policy", "family", "live_share", "score"])
    frame["low"], frame["high"] = frame["score"] - 0.05, frame["score"] + 0.05
    return frame.assign(live_bytes=frame["live_share"] * 2**20, samples=9, n=9)


def budgets_frame() -> pd.DataFrame:
    rows = [(1.0, "dense", "dense", 0.9)]
    for budget, (i, method) in itertools.product(
        (0.1, 0.4), enumerate(("mine", "uniform", "random", "other"))
    ):
        kind = "given" if method == "mine" else "baseline"
        if (budget, method) != (0.1, "other"):
            rows.append((budget, method, kind, 0.5 + budget / 3 - i / 100))
    frame = pd.DataFrame(rows, columns=["budget", "method", "kind", "score"])
    frame["low"], frame["high"] = frame["score"] - 0.04, frame["score"] + 0.02
    return frame.assign(samples=20, strongest=frame["method"] == "uniform")
