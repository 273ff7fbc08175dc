"""What allocators look at, the same for all workers of a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.tuning.storages._base import Place
from avlprof.tuning.storages.postgres import DatabasePlace
from avlprof.tuning.study import open_study

FILE = "evidence.json"
ATTRIBUTE = "avlprof:evidence"


def shared_evidence(place: Place, make: Callable[[], Evidence]) -> Evidence:
    """The evidence of a study: made by whoever is first, once; the others wait for it.

    Machines round sums differently, so each worker's own measurement would turn the same
    parameters into slightly different policies; and with this a worker needs no traced run. A
    folder holds it as `evidence.json`, a database beside the study.
    """
    if isinstance(place, DatabasePlace):
        open_study(place)
    with place.turn():
        held = _read(place)
        if held is None:
            made = make()
            _write(place, dump_evidence(made))
            return made
    return parse_evidence(held, str(place.folder))


def read_evidence(place: Place) -> Evidence:
    """The evidence of a study that was begun.

    Raises:
        UserError: it was not begun, or its evidence cannot be read.
    """
    held = _read(place) if place.exists() else None
    if held is None:
        raise UserError(f"study {place.folder} is not begun; begin it with 'avlprof tune'")
    return parse_evidence(held, str(place.folder))


def dump_evidence(evidence: Evidence) -> str:
    """Evidence as JSON; numbers come back bit by bit."""
    return json.dumps({name: _plain(value) for name, value in asdict(evidence).items()})


def parse_evidence(text: str, where: str) -> Evidence:
    """Evidence from what `dump_evidence` wrote.

    Raises:
        UserError: the text is something else; the message names `where` it is from.
    """
    try:
        return Evidence(**{name: _array(value) for name, value in json.loads(text).items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"the evidence of study {where} cannot be read ({error}); begin a new study"
        ) from None


def _read(place: Place) -> str | None:
    if isinstance(place, DatabasePlace):
        storage = place.storage()
        number = storage.get_study_id_from_name(place.study_name)
        held: str | None = storage.get_study_system_attrs(number).get(ATTRIBUTE)
        return held
    path = place.folder / FILE
    return path.read_text(encoding="utf-8") if path.exists() else None


def _write(place: Place, text: str) -> None:
    if isinstance(place, DatabasePlace):
        storage = place.storage()
        storage.set_study_system_attr(storage.get_study_id_from_name(place.study_name), ATTRIBUTE, text)
    else:
        write_text(place.folder / FILE, text + "\n")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Any:
    return np.array(value, dtype=float) if isinstance(value, list) else value
