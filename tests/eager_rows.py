"""Eager attention weights of one row of a batch, and the statistics of its query rows in plain loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from avlprof.attention.modality import MODALITIES
from tests import oracle

SYSTEM, VISION, TEXT, GENERATED = range(4)
MASSES = (*MODALITIES, "learned_sink")
EDGES = (1, 2, 4, 7, 12)
LEVELS = (50, 90, 100)
LAGS = (1, 3, 8)


@dataclass
class Seen:
    """Eager weights of one unpadded row: `weights[layer] [H, N, N]` over prompt and answer."""

    codes: list[int]
    prompt: int
    weights: list[np.ndarray]

    def __post_init__(self):
        spoken = [code in (TEXT, GENERATED) for code in self.codes]
        self.spoken = [sum(spoken[: i + 1]) for i in range(len(spoken))]  # text tokens up to here


def codes(ids, vision_ids):
    found, seen = [], False
    for token in ids:
        seen = seen or token in vision_ids
        found.append(VISION if token in vision_ids else TEXT if seen else SYSTEM)
    return found


def row_statistics(row, at, seen, options):
    """Continuous statistics of one attention row `row [N]` at position `at`."""
    out = {f"mass_{name}": 0.0 for name in MODALITIES}
    out |= {"mass_sink": row[0], "mass_learned_sink": 1.0 - sum(row), "entropy": 0.0, "text_sink": 0.0}
    distance = [0.0] * (len(EDGES) + 1)
    for i, weight in enumerate(row):
        if weight == 0:
            continue
        out[f"mass_{MODALITIES[seen.codes[i]]}"] += weight
        out["entropy"] -= weight * np.log(weight)
        if seen.codes[i] not in (TEXT, GENERATED):
            continue
        if seen.spoken[i] <= options.text_sink:
            out["text_sink"] += weight
            continue
        away = max(seen.spoken[at] - seen.spoken[i], 0)
        distance[sum(1 for edge in EDGES if edge <= away)] += weight
    return out, distance


def coverage_range(vision, level):
    """Fewest tokens with `level` percent of `sum(vision)`, with the share a hair lower and higher."""
    counts = []
    for share in (level / 100 - 1e-6, level / 100 + 1e-6):
        held, count = 0.0, 0
        for weight in sorted(vision, reverse=True):
            if count and held >= share * sum(vision):
                break
            held, count = held + weight, count + 1
        counts.append(count)
    return counts


class Watched(oracle.Scan):
    """The policy's oracle that also remembers the attention of each decoding step."""

    rows: ClassVar[dict[int, dict[int, torch.Tensor]]] = {}

    def attend(self, t, visible):
        row = super().attend(t, visible)
        if t >= self.o.turns[0][1]:
            self.rows.setdefault(self.layer, {})[t] = row
        return row
