"""A run directory's meta and samples of random numbers, for tests that need no model."""

from __future__ import annotations

import numpy as np
import pandas as pd

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


def same_runs(one, other):
    """Whether two run directories hold the very same numbers, in whatever parts."""
    assert sorted(one.ids()) == sorted(other.ids())
    assert one.hash == other.hash
    keys = ["sample", "layer", "head", "phase", "query"]
    tables = [run.stats().sort_values(keys).reset_index(drop=True) for run in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for sample in one.ids():
        ours, theirs = one.scores(sample), other.scores(sample)
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])
