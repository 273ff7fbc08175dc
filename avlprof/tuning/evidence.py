"""What allocators look at, the same for all workers of a study; and the probe that measures layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.policy import RANKING, Policy, ScorerSpec
from avlprof.tuning.storages._base import EVIDENCE, StudyStorage
from avlprof.watch import SILENT, Watch

if TYPE_CHECKING:
    from avlprof.runtime.forced import ForcedSet

LEVELS = (0.0, 0.05, 0.15, 0.4, 1.0)
SCORER = RANKING


def probe(
    forced: ForcedSet,
    layers: int,
    scorer: str,
    watch: Watch = SILENT,
    governed: tuple[int, ...] | None = None,
) -> NDArray[np.float64]:
    """Damage `[layers, len(LEVELS)]`: KL to dense (nat per token) when one layer keeps a level.

    The levels of a layer share forward passes; at 1 nothing is dropped and the damage is 0, as in layers
    that are not `governed` (None: all are).
    """
    damage = np.zeros((layers, len(LEVELS)))
    below = [i for i, level in enumerate(LEVELS) if level < 1]
    own = range(layers) if governed is None else governed
    watch.phase("probe", 0, len(own) * len(below))
    for done, layer in enumerate(own, start=1):
        policies = [
            Policy(
                vision_keep=tuple(LEVELS[i] if other == layer else 1.0 for other in range(layers)),
                scorer=ScorerSpec.of(scorer),
            )
            for i in below
        ]
        for i, scores in zip(below, forced.score_many(policies), strict=True):
            damage[layer, i] = np.mean([score.kl for score in scores])
        watch.phase("probe", done * len(below), len(own) * len(below))
    return damage


def probed(evidence: Evidence, forced: ForcedSet, path: Path, watch: Watch = SILENT) -> Evidence:
    """Evidence with damage curves, which are measured once and kept in a JSON file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        measured = probe(forced, evidence.layers, SCORER, watch, evidence.governed)
        write_text(path, json.dumps({"levels": LEVELS, "damage": measured.tolist()}, indent=1) + "\n")
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        damage, levels = np.array(note["damage"], dtype=float), np.array(note["levels"], dtype=float)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run again") from None
    if damage.shape != (evidence.layers, len(levels)):
        raise UserError(f"{path} is not of {evidence.layers} layers; delete it and run again")
    return replace(evidence, damage=damage, damage_levels=levels)


def shared_evidence(storage: StudyStorage, make: Callable[[], Evidence]) -> Evidence:
    """The evidence of a study: made by whoever is first, once; the others wait for it.

    Machines round sums differently, so each worker's own measurement would turn the same
    parameters into slightly different policies; and with this a worker needs no traced run. A
    folder holds it as `evidence.json`, a database beside the study.
    """
    with storage.locked():
        note = storage.read_note(EVIDENCE)
        if note is None:
            evidence = make()
            storage.write_note(EVIDENCE, dump_evidence(evidence))
            return evidence
    return parse_evidence(note, str(storage.folder))


def read_evidence(storage: StudyStorage) -> Evidence:
    """The evidence of a study that was begun.

    Raises:
        UserError: it was not begun, or its evidence cannot be read.
    """
    note = storage.read_note(EVIDENCE) if storage.exists() else None
    if note is None:
        raise UserError(f"study {storage.folder} is not begun; begin it with 'avlprof tune'")
    return parse_evidence(note, str(storage.folder))


def dump_evidence(evidence: Evidence) -> str:
    """Evidence as JSON; numbers come back bit by bit."""
    return json.dumps({name: _plain(value) for name, value in asdict(evidence).items()})


def parse_evidence(text: str, source: str) -> Evidence:
    """Evidence from what `dump_evidence` wrote.

    Raises:
        UserError: the text is something else; the message names its `source`.
    """
    try:
        noted = json.loads(text)
        governed = noted.pop("governed", None)
        arrays = {name: _array(value) for name, value in noted.items()}
        return Evidence(**arrays, governed=None if governed is None else tuple(governed))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"the evidence of study {source} cannot be read ({error}); begin a new study"
        ) from None


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Any:
    return np.array(value, dtype=float) if isinstance(value, list) else value
