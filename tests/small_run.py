"""A run directory's meta and samples of random numbers, for tests that need no model."""

from __future__ import annotations

import numpy as np

from avlprof.runs import RunMeta

META = RunMeta(
    model="tiny",
    model_hash="abc",
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    dtype="float32",
    device="cpu",
    task="shapes",
    max_new_tokens=8,
)


def sample(name, seed=0, vision=5, steps=3):
    """One traced sample with random numbers: its row, stats and scores."""
    rng = np.random.default_rng(seed)
    row = {"sample": name, "prompt": f"what is {name}?", "references": ["a", "b"], "vision": vision}
    stats = [
        {"sample": name, "layer": layer, "entropy": rng.random(), "distance": rng.random(4, dtype=np.float32)}
        for layer in range(META.layers)
    ]
    shapes = {"last": (2, vision), "instruction": (2, vision), "decode": (steps, 2, vision)}
    return row, stats, {key: rng.random(shape, dtype=np.float32) for key, shape in shapes.items()}


def files(path):
    """Names of everything in a folder that is not a lock."""
    return sorted(p.name for p in path.iterdir() if not p.name.startswith(".lock"))
