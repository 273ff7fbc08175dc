"""What a page shows of one traced sample: its words, their maps, and where attention went by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.analysis.lens import Lens
from avlprof.errors import UserError
from avlprof.explore.packing import as_text, pack_maps
from avlprof.models.tiles import Tile, parse_tiles
from avlprof.plots.words import group_words
from avlprof.runs import RunDirectory, RunMeta
from avlprof.runs.directory import Scores
from avlprof.runs.meta import HEADS, LEARNED_SINK
from avlprof.tasks.text import printable

Array = NDArray[np.float32]
QUESTION, LAST, ANSWER = "question", "last", "answer"
MASSES = ("mass_sink", "mass_system", "mass_vision", "mass_text", "mass_generated", LEARNED_SINK)
FACTS = ("system", "vision", "text", "generated")


@dataclass(frozen=True)
class Record:
    """One traced sample: its row of `samples`, its rows of `stats`, its scores (see `RunDirectory`)."""

    row: Mapping[Any, Any]
    stats: pd.DataFrame
    scores: Scores


@dataclass(frozen=True)
class Word:
    """A word of the question or the answer, and the rows behind its map.

    `kind` is `question` (rows of the word itself, or the mean of all), `last` (the prompt's last row) or
    `answer` (the rows that wrote it: 0 is the prompt's last row, n the n-th decoding step).
    """

    text: str
    kind: str
    rows: tuple[int, ...]


def records(run: RunDirectory, ids: Sequence[str]) -> dict[str, Record]:
    """Samples of a run by id; those that it does not hold are left out."""
    rows = {str(row["sample"]): row for row in run.samples().to_dict("records")}
    own = [sample for sample in ids if sample in rows]
    columns = ["sample", "layer", "query", *MASSES]
    parts = [part[part["sample"].isin(own)] for part in run.stats_by_part(columns)]
    stats = pd.concat(parts, ignore_index=True)
    return {
        sample: Record(rows[sample], stats[stats["sample"] == sample], run.scores(sample)) for sample in own
    }


def side(record: Record, meta: RunMeta, heads: bool = False) -> dict[str, Any]:
    """What a page shows of a sample in one run, as JSON takes it.

    Args:
        heads: also each head's maps, if the run has them.

    Raises:
        UserError: the scores have other shapes than the run's layers and vision tokens.
    """
    words = sample_words(record)
    maps = _word_maps(record, meta, words, "")
    vision = int(record.row["vision"])
    own = meta.per_head and heads
    return {
        "answer": printable(str(record.row["answer"])),
        "counts": {name: int(record.row[name]) for name in FACTS},
        "tiles": [[_numbers(tile) for tile in picture] for picture in sample_tiles(record.row, vision)],
        "placed": str(record.row["tiles"]) != "[]",
        "words": [{"text": printable(word.text), "kind": word.kind, "rows": word.rows} for word in words],
        "maps": pack_maps(maps),
        "sums": as_text(maps.sum(axis=-1).astype("<f4")),
        "heads": pack_maps(_word_maps(record, meta, words, HEADS)) if own else None,
        "masses": {kind: _masses(record, kind, meta.layers) for kind in ("last", "generated")},
    }


def sample_words(record: Record) -> tuple[Word, ...]:
    """The words that have a map, in order.

    Without `text_rows` the question is one entry, the mean of its rows.
    """
    row, scores = record.row, record.scores
    question = [Word("question", QUESTION, (0,))]
    if "text" in scores:
        pieces = _pieces(row, "text_tokens", len(scores["text"]))
        question = [Word(text, QUESTION, tuple(own)) for text, own in zip(*group_words(pieces), strict=True)]
    steps = len(scores["decode"]) + 1
    pieces = _pieces(row, "tokens", steps)
    answer = [Word(text, ANSWER, tuple(own)) for text, own in zip(*group_words(pieces), strict=True)]
    return (*question, Word("last prompt token", LAST, (0,)), *answer)


def _pieces(row: Mapping[Any, Any], name: str, count: int) -> list[str]:
    """Tokens of a column, as many as there are rows; numbered where a run noted none."""
    found = row.get(name)
    noted = [] if found is None or isinstance(found, float) else [str(token) for token in found]
    return [*noted[:count], *(f" [{index + 1}]" for index in range(len(noted), count))]


def _word_maps(record: Record, meta: RunMeta, words: Sequence[Word], suffix: str) -> Array:
    """Means over each word's rows, fp32 `[words, layers, vision]`; of heads with an axis before vision."""
    scores = record.scores
    name = "text" if "text" in scores else "instruction"
    try:
        first, last, steps = (scores[f"{part}{suffix}"] for part in (name, "last", "decode"))
    except KeyError as error:
        raise UserError(f"sample '{record.row['sample']}' has no scores {error}; trace it anew") from None
    first = first if name == "text" else first[None]
    shape = (meta.layers, *([meta.heads] if suffix else []), int(record.row["vision"]))
    for part in (first, last[None], steps):
        if part.shape[1:] != shape:
            raise UserError(
                f"scores of sample '{record.row['sample']}' must be {list(shape)} a row, "
                f"got {list(part.shape[1:])}; trace it anew"
            )
    behind = np.concatenate([last[None], steps])
    maps = [(first if word.kind == QUESTION else behind)[list(word.rows)].mean(axis=0) for word in words]
    return np.stack(maps).astype(np.float32)


def sample_tiles(row: Mapping[Any, Any], vision: int) -> tuple[tuple[Tile, ...], ...]:
    """Where a sample's vision tokens lie in its pictures; in one near-square block if that is not known.

    Raises:
        UserError: the run's tiles are no tiles, or reach beyond the vision tokens.
    """
    found = parse_tiles(str(row["tiles"]))
    for tile in (tile for picture in found for tile in picture):
        whole = all(isinstance(number, int) for number in (tile.first, tile.rows, tile.columns, tile.stride))
        fits = (
            whole and tile.rows > 0 and tile.columns > 0 and tile.first >= 0 and tile.stride >= tile.columns
        )
        sides = np.array(tile.box, dtype=float)
        drawn = bool(np.isfinite(sides).all() and sides[2] > sides[0] and sides[3] > sides[1])
        if not (fits and drawn) or tile.first + (tile.rows - 1) * tile.stride + tile.columns > vision:
            raise UserError(
                f"tiles of sample '{row['sample']}' must lie within its {vision} vision tokens and have a "
                f"place, got {tile}; trace it anew"
            )
    if found or not vision:
        return found
    columns = max(round(vision**0.5), 1)
    rows, rest = divmod(vision, columns)
    edge = rows / (rows + (rest > 0))
    block = Tile(0, rows, columns, columns, (0.0, 0.0, 1.0, edge))
    ragged = Tile(rows * columns, 1, rest, rest, (0.0, edge, rest / columns, 1.0))
    return ((block, ragged) if rest else (block,),)


SAID = 3
"""Words of a patch and layer in a page; a lens may hold more."""


def says(lens: Lens, sample: str, record: Record) -> dict[str, Any] | None:
    """What a sample's vision tokens say, as JSON takes it; None where the lens did not read the sample.

    `ids` uint16 are places in `words`, `shares` uint8 are probabilities in 255ths, `[layers, vision, top]`.

    Raises:
        UserError: the lens read another number of vision tokens, or more different words than 65,536.
    """
    if sample not in {one.id for one in lens.samples}:
        return None
    one = lens.sample(sample)
    ids, shares = one.ids[..., :SAID], one.shares[..., :SAID]
    if ids.shape[1] != int(record.row["vision"]):
        raise UserError(
            f"the lens read {ids.shape[1]} vision tokens of sample '{sample}', the run has "
            f"{int(record.row['vision'])}; read the run's own samples"
        )
    known, places = np.unique(ids, return_inverse=True)
    if len(known) > 1 << 16:
        raise UserError(f"sample '{sample}' has {len(known)} different words; read fewer layers")
    return {
        "layers": list(lens.layers),
        "shape": list(ids.shape),
        "words": [printable(lens.word(token).strip()) for token in known.tolist()],
        "ids": as_text(places.reshape(ids.shape).astype("<u2")),
        "shares": as_text(np.rint(255 * shares.clip(0.0, 1.0)).astype(np.uint8)),
    }


def _numbers(tile: Tile) -> list[float]:
    return [tile.first, tile.rows, tile.columns, tile.stride, *(round(float(x), 6) for x in tile.box)]


def _masses(record: Record, kind: str, layers: int) -> list[list[float]] | None:
    """Shares of a kind of row's attention by layer, in the order of `MASSES`, mean over heads.

    `mass_sink`, the first token's, is taken out of that of its modality.
    """
    own = record.stats[record.stats["query"] == kind]
    if own.empty:
        return None
    means = own.groupby("layer")[list(MASSES)].mean().reindex(range(layers)).fillna(0.0)
    table = np.array(means, dtype=float)
    theirs = MASSES.index("mass_system" if int(record.row["system"]) else "mass_vision")
    table[:, theirs] = (table[:, theirs] - table[:, 0]).clip(min=0.0)
    return [[round(float(share), 4) for share in row] for row in table]
