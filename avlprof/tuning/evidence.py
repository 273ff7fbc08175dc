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
from avlprof.policy import BITS, FULL, RANKING, Policy, ScorerSpec
from avlprof.tuning.storages._base import EVIDENCE, StudyStorage
from avlprof.watch import SILENT, Part, Watch

if TYPE_CHECKING:
    from avlprof.runtime.forced import ForcedSet

LEVELS = (0.0, 0.05, 0.15, 0.4, 1.0)
FEWER = tuple(bits for bits in BITS if bits < FULL)
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
    below = [level for level in LEVELS if level < 1]

    def kept(layer: int) -> list[Policy]:
        shares = [tuple(level if other == layer else 1.0 for other in range(layers)) for level in below]
        return [Policy(vision_keep=keep, scorer=ScorerSpec.of(scorer)) for keep in shares]

    damage = np.zeros((layers, len(LEVELS)))
    damage[:, : len(below)] = _damage(forced, layers, governed, kept, Part(watch, "probe"))
    return damage


def probe_bits(
    forced: ForcedSet, layers: int, watch: Watch = SILENT, governed: tuple[int, ...] | None = None
) -> NDArray[np.float64]:
    """Damage `[layers, len(FEWER)]`: KL to dense when one layer stores all vision KV in so few bits."""

    def stored(layer: int) -> list[Policy]:
        return [
            Policy(vision_bits=tuple(bits if other == layer else FULL for other in range(layers)))
            for bits in FEWER
        ]

    return _damage(forced, layers, governed, stored, Part(watch, "probe of bits"))


def _damage(
    forced: ForcedSet,
    layers: int,
    governed: tuple[int, ...] | None,
    of_layer: Callable[[int], list[Policy]],
    watch: Watch,
) -> NDArray[np.float64]:
    """KL to dense (nat per token) `[layers, policies]` of the policies of each layer; 0 of others."""
    own = range(layers) if governed is None else governed
    damage = np.zeros((layers, len(of_layer(0))))
    watch.phase("", 0, len(own) * damage.shape[1])
    for done, layer in enumerate(own, start=1):
        scores = forced.score_many(of_layer(layer))
        damage[layer] = [np.mean([score.kl for score in part]) for part in scores]
        watch.phase("", done * damage.shape[1], len(own) * damage.shape[1])
    return damage


def probed(
    evidence: Evidence, forced: ForcedSet, path: Path, watch: Watch = SILENT, *, bits: bool = False
) -> Evidence:
    """Evidence with damage curves, which are measured once and kept in a JSON file; in bits too if asked.

    A file that was measured with another ranking, as those of 0.1.0 were, is measured anew.

    Args:
        bits: measure as well what it costs to store a layer in fewer bits.

    Raises:
        UserError: the file holds something else.
    """
    layers, governed = evidence.layers, evidence.governed
    note = _probe_note(path)
    if note.get("scorer") != SCORER:
        measured = probe(forced, layers, SCORER, watch, governed).tolist()
        note = {"scorer": SCORER, "levels": LEVELS, "damage": measured}
        write_text(path, json.dumps(note, indent=1) + "\n")
    if bits and "bits" not in note:
        note |= {"bits": FEWER, "bit_damage": probe_bits(forced, layers, watch, governed).tolist()}
        write_text(path, json.dumps(note, indent=1) + "\n")
    try:
        damage, levels = np.array(note["damage"], dtype=float), np.array(note["levels"], dtype=float)
        harm = np.array(note["bit_damage"], dtype=float) if bits else None
        numbers = np.array(note["bits"], dtype=float) if bits else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run again") from None
    odd = harm is not None and numbers is not None and harm.shape != (layers, len(numbers))
    if damage.shape != (layers, len(levels)) or odd:
        raise UserError(f"{path} is not of {evidence.layers} layers; delete it and run again")
    return replace(evidence, damage=damage, damage_levels=levels, bit_damage=harm, bit_levels=numbers)


def _probe_note(path: Path) -> dict[str, Any]:
    """What a probe's file holds; empty where there is none."""
    try:
        note = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run again") from None
    if not isinstance(note, dict):
        raise UserError(f"{path} cannot be read (it holds no JSON object); delete it and run again")
    return note


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
