"""The sensitivity probe: what it costs to drop vision KV in one layer alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.policy import Policy, ScorerSpec
from avlprof.runtime.forced import ForcedSet

LEVELS = (0.0, 0.05, 0.15, 0.4, 1.0)
SCORER = "instruction"


def probe(
    forced: ForcedSet, layers: int, scorer: str, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.float64]:
    """Damage `[layers, len(LEVELS)]`: KL to dense (nat per token) when one layer keeps a level.

    The levels of a layer share forward passes; at 1 nothing is dropped and the damage is 0.
    """
    damage = np.zeros((layers, len(LEVELS)))
    if progress:
        progress(0, layers * (len(LEVELS) - 1))
    below = [i for i, level in enumerate(LEVELS) if level < 1]
    for layer in range(layers):
        policies = [
            Policy(
                vision_keep=tuple(LEVELS[i] if other == layer else 1.0 for other in range(layers)),
                scorer=ScorerSpec(name=scorer),
            )
            for i in below
        ]
        for i, scores in zip(below, forced.score_many(policies), strict=True):
            damage[layer, i] = np.mean([score.kl for score in scores])
        if progress:
            progress((layer + 1) * len(below), layers * len(below))
    return damage


def probed(
    evidence: Evidence, forced: ForcedSet, path: Path, progress: Callable[[int, int], None] | None = None
) -> Evidence:
    """Evidence with damage curves, which are measured once and kept in a JSON file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        measured = probe(forced, evidence.layers, SCORER, progress)
        write_text(path, json.dumps({"levels": LEVELS, "damage": measured.tolist()}, indent=1) + "\n")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        damage, levels = np.array(held["damage"], dtype=float), np.array(held["levels"], dtype=float)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run again") from None
    if damage.shape != (evidence.layers, len(levels)):
        raise UserError(f"{path} is not of {evidence.layers} layers; delete it and run again")
    return replace(evidence, damage=damage, damage_levels=levels)
