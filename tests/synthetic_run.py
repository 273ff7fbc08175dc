"""A run directory of random attention, for tests of the analysis; no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from avlprof.runs import RunDirectory, RunMeta, RunWriter

LAYERS, HEADS, STEPS = 4, 2, 11
MODALITIES = ("system", "vision", "text", "generated")


def settings(**changes: Any) -> RunMeta:
    """Settings of the synthetic run."""
    fixed: dict[str, Any] = {
        "model": "random",
        "revision": "r1",
        "model_hash": "h1",
        "layers": LAYERS,
        "heads": HEADS,
        "kv_heads": 1,
        "head_dim": 8,
        "dtype": "float32",
        "device": "cpu",
        "task": "noise",
        "max_new_tokens": STEPS + 1,
        "lags": (1, 2, 4, 8),
        "distances": (1, 2, 4, 8, 16, 32),
        "versions": {"torch": "0"},
    }
    return RunMeta(**fixed | changes)


def write_run(
    path: Path,
    vision: tuple[int, ...],
    seed: int = 0,
    decode: bool = True,
    parts: int = 2,
    averaged: bool = False,
    first: int = 0,
    **changes: Any,
) -> RunDirectory:
    """A run with one sample for each entry of `vision`; layer 3 of sample 0 never looks at vision.

    `averaged` writes the averages of the heads in their place; sample ids count from `first`.
    """
    rng = np.random.default_rng(seed)
    meta = settings(**changes)
    writer = RunWriter(path, meta)
    for index, count in enumerate(vision):
        steps = STEPS - index if decode else 0
        scores = {
            "last": _scores(rng, (meta.layers, count)),
            "instruction": _scores(rng, (meta.layers, count)),
            "decode": _scores(rng, (steps, meta.layers, count)),
        }
        if index == 0:
            for values in scores.values():
                values[..., 3, :] = 0.0
        if index == 1:
            scores["instruction"][:] = 0.0
        if meta.per_head:
            scores |= _of_heads(np.random.default_rng([seed, index]), scores)
        sample = {
            "sample": f"s{first + index}",
            "group": "",
            "prompt": "?",
            "references": ["x"],
            "answer": "x",
            "system": 3 + index,
            "vision": count,
            "text": 6 + index % 3,
            "generated": steps + 1,
            "tiles": "[]",
            "seconds": 0.1,
        }
        kinds = [("prefill", kind) for kind in ("system", "vision", "text", "last")]
        kinds += [("decode", "generated")] if decode else []
        stats = [
            {"sample": f"s{first + index}", "layer": layer, "head": head, "phase": phase, "query": query}
            | _statistics(rng, meta, count, phase)
            for layer in range(meta.layers)
            for head in range(HEADS)
            for phase, query in kinds
        ]
        stats = _averages(stats) if averaged else stats
        writer.add(sample, stats, scores)
        if (index + 1) % max(len(vision) // parts, 1) == 0:
            writer.flush()
    writer.flush()
    return RunDirectory(path)


def _of_heads(
    rng: np.random.Generator, scores: dict[str, np.ndarray[Any, np.dtype[np.float32]]]
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Scores head by head, whose mean is what is given; head 1 of layer 2 never looks at vision."""
    found = {}
    for name, mean in scores.items():
        parts = rng.dirichlet(np.ones(HEADS), size=mean.shape)  # each head's part of a token's sum
        parts[..., 2, :, :] = np.eye(HEADS)[0]
        found[f"{name}_heads"] = (HEADS * mean[..., None] * parts).astype(np.float32).swapaxes(-1, -2)
    return found


def _averages(stats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `head` -1: the mean of each number over the heads of a layer and query, NaN left out."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in stats:
        groups.setdefault((row["sample"], row["layer"], row["phase"], row["query"]), []).append(row)
    means = []
    for rows in groups.values():
        mean = dict(rows[0]) | {"head": -1}
        for name in mean.keys() - {"sample", "layer", "head", "phase", "query", "rows"}:
            values = np.array([row[name] for row in rows], dtype=np.float64)
            seen = values[~np.isnan(values).reshape(len(values), -1).any(axis=1)]
            average = seen.mean(axis=0) if len(seen) else np.full(values.shape[1:], np.nan)
            mean[name] = average.tolist()
        means.append(mean)
    return means


def _scores(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Softmax weights with a share of mass left for other modalities."""
    weights = np.exp(2.5 * rng.normal(size=shape))
    mass = rng.uniform(0.1, 0.9, size=(*shape[:-1], 1))
    return (mass * weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def _statistics(rng: np.random.Generator, meta: RunMeta, vision: int, phase: str) -> dict[str, Any]:
    masses = rng.dirichlet(np.ones(4))
    row: dict[str, Any] = {f"mass_{name}": float(m) for name, m in zip(MODALITIES, masses, strict=True)}
    row |= {
        "rows": 1,
        "mass_sink": float(masses[0] / 2),
        "mass_learned_sink": 0.0,
        "entropy": float(rng.uniform(0, 4)),
        "text_sink": 0.01,
    }
    few = (
        np.sort(rng.integers(1, vision + 1, size=len(meta.coverages)))
        if vision
        else [np.nan] * len(meta.coverages)
    )
    row |= {f"coverage_{level}": float(n) for level, n in zip(meta.coverages, few, strict=True)}
    row["distance"] = (
        (rng.dirichlet(np.ones(len(meta.distances) + 1)) * masses[2]).astype(np.float32).tolist()
    )
    for lag in meta.lags:
        row[f"overlap_{lag}"] = float(rng.uniform(0.4, 0.9)) if phase == "decode" else float("nan")
    return row
