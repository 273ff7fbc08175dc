"""Every figure for a model of 32 layers and 32 heads, with long lists of policies, words and settings.

`python -m tests.plots.real_size FOLDER` writes them as PNG, SVG and PDF, to be looked at.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from avlprof import plots
from avlprof.analysis.lens import Lens
from avlprof.analysis.naming import SampleLens
from avlprof.models.tiles import dump_tiles, grid
from tests.plots.made import (
    CAPTION,
    every_figure,
    head_frame,
    importances_frame,
    knobs_frame,
    over,
    trials_frame,
)

LAYERS, HEADS, SIDE = 32, 32, 24
METHODS = (
    *("tuned", "uniform", "random", "uniform, last_query", "streamingllm", "h2o", "snapkv", "pyramidkv"),
    *("prefixkv", "vl-cache", "quantised-8", "quantised-4", "paper/llava-1.6"),
)
WORDS = (
    "the",
    "a",
    "red",
    "blue",
    "square",
    "triangle",
    "in",
    "and",
    ".",
    "<|im_end|>",
    "yellow",
    "star",
    "left",
)
KNOBS = (
    *("allocator", "mix", "temperature", "floor", "scorer", "refresh_interval", "spread", "vision_compute"),
    *("vision_bits", "text_window", "sink", "heavy", "heads", "core_score.prompt", "core_score.memory"),
)


def shares_frame() -> pd.DataFrame:
    """Thirteen methods at three budgets, near each other, as comparisons have them."""
    rng = np.random.default_rng(3)
    rows = [("dense", "dense", "dense", 1.0, 0.86)]
    for place, (method, budget) in enumerate(itertools.product(METHODS, (0.1, 0.2, 0.4))):
        score = 0.5 + budget / 2 + 0.06 * float(rng.normal())
        kind = "given" if method == "tuned" else "baseline"
        rows.append((f"{method}-{place}", method, kind, budget - 0.002 * rng.random(), score))
    frame = pd.DataFrame(rows, columns=["policy", "family", "kind", "live_share", "score"])
    frame["low"], frame["high"] = frame["score"] - 0.04, frame["score"] + 0.04
    frame["budget"] = frame["live_share"].round(1)
    strongest = (frame["family"] == "vl-cache") & (frame["kind"] == "baseline")
    return frame.assign(method=frame["family"], live_bytes=frame["live_share"] * 2**30, strongest=strongest,
                        samples=420, n=420)  # fmt: skip


def picture() -> Image.Image:
    """A photograph's worth of colours, smooth."""
    y, x = np.mgrid[0:240, 0:240] / 240
    return Image.fromarray((255 * np.dstack([x, y, 1 - x * y])).astype(np.uint8))


def lens() -> Lens:
    """Words in patches of about four by four, 32 layers deep."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, len(WORDS), (LAYERS, SIDE // 4, SIDE // 4))
    ids = np.kron(coarse, np.ones((1, 4, 4), dtype=int)).reshape(LAYERS, -1, 1).astype(np.int32)
    shares = rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)
    tiles = dump_tiles([grid(SIDE, SIDE).tiles])
    samples = tuple(
        SampleLens(f"s{i}", CAPTION.prompt, ("a red star",), tiles, ids, shares) for i in range(3)
    )
    return Lens({"layers": list(range(LAYERS)), "top": 1}, samples, dict(enumerate(WORDS)))


def figures(*names: str) -> dict[str, Figure]:
    """All figures by name, or those of `names`; of random numbers."""
    rng, place, frame = np.random.default_rng(1), over(SIDE, SIDE), shares_frame()
    metric = "Exact match on shapes (held-out)"
    read = functools.cache(lens)
    knobs = pd.concat([knobs_frame()] * 8, ignore_index=True).head(len(KNOBS)).assign(knob=KNOBS)
    importances = pd.concat([importances_frame()] * 8, ignore_index=True).head(len(KNOBS))

    def scores(rows: int, count: int = LAYERS) -> NDArray[np.float64]:
        return rng.gamma(0.3, size=(rows, count, SIDE * SIDE)) / 300

    drawings: dict[str, Callable[[], Figure]] = {
        "heads": lambda: plots.head_maps(
            plots.head_info(head_frame(LAYERS, HEADS), ("vision", "sink", "entropy"))
        ),
        "pareto": lambda: plots.pareto_front(frame, score=metric),
        "front": lambda: plots.budget_front(frame),
        "budgets": lambda: plots.quality_by_budget(frame.drop(columns="policy"), score=metric),
        "heatmap": lambda: plots.vision_heatmap(picture(), scores(1)[0], place, caption=CAPTION),
        "all layers": lambda: plots.vision_heatmap(
            picture(), scores(1)[0], place, range(LAYERS), caption=CAPTION
        ),
        "words": lambda: plots.word_heatmaps(picture(), scores(23), place, (WORDS * 2)[:23], caption=CAPTION),
        "head heatmaps": lambda: plots.head_heatmaps(
            picture(), scores(2, HEADS), place, kv_heads=8, caption=CAPTION
        ),
        "trials": lambda: plots.trial_history(trials_frame(200)),
        "knobs": lambda: plots.knob_effects(knobs),
        "importances": lambda: plots.parameter_importances(importances.assign(parameter=KNOBS)),
        "lens layers": lambda: plots.lens_layers(read().by_layer(), len(read().samples)),
        "lens words": lambda: plots.lens_words(read(), picture()),
        "lens last": lambda: plots.lens_words(read(), picture(), layers=[LAYERS - 1]),
    }
    if names:
        return {name: drawings[name]() for name in names}
    whole = {name: figure for name, figure in every_figure(LAYERS, HEADS).items() if name != "first trial"}
    return whole | {name: draw() for name, draw in drawings.items()}


def main(folder: str) -> None:
    """Write every figure in every format."""
    for name, figure in figures().items():
        for suffix in ("png", "svg", "pdf"):
            plots.save_figure(figure, Path(folder) / name.replace(" ", "-"), suffix)


if __name__ == "__main__":
    main(sys.argv[1])
