"""Runs with everything that an explorer shows, made of random attention, and a browser to look at it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from avlprof.models.tiles import Tile, dump_tiles
from avlprof.run import Run
from avlprof.runs import RunWriter
from tests.synthetic_run import settings

QUESTION = ("Ġwhat", "Ġis", "Ġthis", "?", "Ġ:")
ANSWER = ("Ġa", "Ġred", "Ġtri", "angle", "Ġon", "Ġwhite", "</s>")
LARGE = [[Tile(0, 3, 4, 5), Tile(15, 2, 2, 2, (0.0, -0.25, 1.0, 1.25))], [Tile(19, 2, 3, 3)]]
"""A picture of 3 x 4 details with newlines under a padded thumbnail of 2 x 2, and a second picture."""


@dataclass(frozen=True)
class Made:
    """A sample to be made; `text` False leaves out what only `text_rows` stores."""

    name: str
    tiles: list = field(default_factory=lambda: LARGE)
    vision: int = 25
    question: tuple = QUESTION
    answer: tuple = ANSWER
    prompt: str = "what is this?"
    said: str = "a red triangle on white"
    references: tuple = ("x",)
    sizes: tuple = ((80, 60), (30, 30))


def make_run(path, samples, seed=0, text=True, per_head=True, note=True, **changes):
    """A run directory; with `note` its pictures lie beside it, in plain colours."""
    rng = np.random.default_rng(seed)
    meta = settings(per_head=per_head, text_rows=text, **changes)
    writer, noted = RunWriter(path, meta), []
    for sample in samples:

        def rows(count, sample=sample):
            weights = rng.dirichlet(np.full(max(sample.vision, 1), 0.3), (count, meta.layers, meta.heads))
            mass = rng.uniform(0.1, 0.9, (count, meta.layers, meta.heads, 1))
            return (weights * mass)[..., : sample.vision].astype(np.float32)

        asked, steps = rows(len(sample.question)), rows(len(sample.answer))
        heads = {"last": steps[0], "instruction": asked.mean(axis=0), "decode": steps[1:]}
        heads |= {"text": asked} if text else {}
        scores = {name: values.mean(axis=-2) for name, values in heads.items()}
        scores |= {f"{name}_heads": values for name, values in heads.items()} if per_head else {}
        row = {"sample": sample.name, "group": "", "prompt": sample.prompt, "answer": sample.said}
        row |= {"references": list(sample.references), "tokens": list(sample.answer)}
        row |= {"text_tokens": list(sample.question)} if text else {}
        row |= {"system": 3, "vision": sample.vision, "text": len(sample.question)}
        row |= {"generated": len(sample.answer), "tiles": dump_tiles(sample.tiles), "seconds": 0.1}
        writer.add(row, list(_stats(rng, meta, sample.name)), scores)
        if note and sample.sizes:
            noted.append({"id": sample.name, "images": _pictures(path.parent, len(noted), sample.sizes)})
    writer.flush()
    (path / "pictures.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in noted))
    return Run.open(path)


def _stats(rng, meta, name):
    for layer in range(meta.layers):
        for phase, query in (("prefill", "last"), ("decode", "generated")):
            masses = rng.dirichlet(np.ones(4))
            row = {"sample": name, "layer": layer, "head": -1, "phase": phase, "query": query, "rows": 1}
            kinds = ("system", "vision", "text", "generated")
            row |= {f"mass_{kind}": float(mass) for kind, mass in zip(kinds, masses, strict=True)}
            row |= {"mass_sink": float(masses[0]) / 2, "mass_learned_sink": 0.0}
            row |= {"entropy": 1.0, "text_sink": 0.0, "distance": [0.0] * (len(meta.distances) + 1)}
            row |= {f"coverage_{level}": 1.0 for level in meta.coverages}
            yield row | {f"overlap_{lag}": 0.5 for lag in meta.lags}


def _pictures(folder, number, sizes):
    paths = []
    for index, size in enumerate(sizes):
        paths.append(str(folder / f"picture-{number}-{index}.png"))
        Image.new("RGB", size, (40, 120, 200)).save(paths[-1])
    return paths


def missing_browser():
    """Why no browser can be steered here; empty where one can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright is not installed (pip install 'avlprof[browser]')"
    return "" if chromium() else "there is no chromium (apt-get install chromium), nor AVLPROF_CHROMIUM"


def chromium():
    """The browser's program."""
    names = (os.environ.get("AVLPROF_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)
