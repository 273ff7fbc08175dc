"""What vision tokens say behind each layer, over samples: the words themselves, as a table and as files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from avlprof.analysis.naming import SampleLens, by_layer, named, sentences
from avlprof.errors import UserError, cut
from avlprof.files import checked_path, replacing, write_text
from avlprof.tasks.text import listed
from avlprof.tasks.truth import Thing, Truth

SCHEMA: Final = "avlprof.lens/1"
META, TABLE, SAMPLES = "meta.json", "lens.parquet", "samples.parquet"
LOOSE: Final = ("created", "versions", "device")
"""Fields of the settings that may differ between what is there and what is added."""


@dataclass(frozen=True)
class Lens:
    """Words that vision tokens say behind each layer; `avlprof.lens` makes one.

    `meta` says of what model, task and layers; `words` gives each token id's text.
    """

    meta: Mapping[str, Any]
    samples: tuple[SampleLens, ...] = field(repr=False)
    words: Mapping[int, str] = field(repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers behind which tokens were read."""
        return tuple(self.meta["layers"])

    def sample(self, name: str | None = None) -> SampleLens:
        """A sample by id, by default the first; `UserError` when it was not read."""
        found = [one for one in self.samples if name in (None, one.id)]
        if not found:
            raise UserError(
                f"sample '{name}' was not read; these were: {listed(one.id for one in self.samples)}"
            )
        return found[0]

    def table(self) -> pd.DataFrame:
        """One row a word: `sample, layer, token, rank, word, share`; rank 0 is the likeliest."""
        parts = []
        for one in self.samples:
            depth, vision, top = one.ids.shape
            part = {
                "layer": np.repeat(self.layers, vision * top),
                "token": np.tile(np.repeat(np.arange(vision), top), depth),
                "rank": np.tile(np.arange(top), depth * vision),
                "id": one.ids.ravel(),
                "share": one.shares.ravel(),
            }
            parts.append(pd.DataFrame(part).assign(sample=one.id))
        whole = pd.concat(parts, ignore_index=True)
        whole["word"] = whole["id"].map(dict(self.words)).astype("category")
        whole["sample"] = whole["sample"].astype("category")
        return whole[["sample", "layer", "token", "rank", "id", "word", "share"]]

    def named(self) -> pd.DataFrame:
        """How often the likeliest word is the right one, a row a sample, layer and measure.

        See `avlprof.analysis.naming.named`.
        """
        return named(self.samples, self.layers, self.word)

    def by_layer(self) -> pd.DataFrame:
        """Means of `named` over samples with 95% intervals; see `avlprof.analysis.naming.by_layer`."""
        return by_layer(self.samples, self.layers, self.word)

    def findings(self) -> list[str]:
        """In sentences: behind which layers tokens name what they show."""
        return sentences(self.by_layer())

    def commonest(self, layer: int, count: int = 4) -> list[str]:
        """The words that most tokens of all samples say behind a layer, without blanks around them."""
        row = self.layers.index(layer)
        said = Counter(token for one in self.samples for token in one.ids[row, :, 0].tolist())
        words = Counter[str]()
        for token, times in said.items():
            words[self.word(token).strip() or "␣"] += times
        return [word for word, _ in words.most_common(count)]

    def word(self, token: int) -> str:
        """The text of a token id."""
        return self.words.get(int(token), f"<{int(token)}>")

    def save(self, folder: Path | str) -> list[Path]:
        """Write settings, samples and words into a folder, each file whole; returns the paths."""
        folder = checked_path(folder, "output")
        rows = [
            {
                "sample": one.id,
                "prompt": one.prompt,
                "references": list(one.references),
                "tiles": one.tiles,
                "vision": one.ids.shape[1],
                "truth": json.dumps([_dumped(truth) for truth in one.truth]),
            }
            for one in self.samples
        ]
        for name, frame in ((TABLE, self.table()), (SAMPLES, pd.DataFrame(rows))):
            with replacing(folder / name) as partial:
                frame.to_parquet(partial, index=False)
        write_text(folder / META, json.dumps(dict(self.meta), indent=2) + "\n")
        return [folder / name for name in (META, SAMPLES, TABLE)]

    @classmethod
    def open(cls, folder: Path | str) -> Lens:
        """What `save` wrote; `UserError` when there is none, or its files do not fit each other."""
        folder = checked_path(folder, "lens")
        if not (folder / META).is_file():
            raise UserError(f"{folder} holds no lens; make one with avlprof lens -o {folder}")
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta.get("schema") != SCHEMA:
                raise UserError(f"{folder / META} must have schema {SCHEMA}, got {meta.get('schema')!r}")
            rows = pd.read_parquet(folder / SAMPLES).to_dict("records")
            table = pd.read_parquet(folder / TABLE)
            groups = dict(list(table.groupby("sample", sort=False, observed=True)))
            shape = (len(meta["layers"]), int(meta["top"]))
            samples = tuple(_loaded(row, groups.get(row["sample"], table[:0]), *shape) for row in rows)
            pairs = table[["id", "word"]].drop_duplicates("id").itertuples(index=False, name=None)
            return cls(meta, samples, {int(token): str(word) for token, word in pairs})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder} cannot be read ({cut(str(error))}); delete it and read anew") from None


def _dumped(truth: Truth) -> dict[str, Any]:
    things = [[thing.color, *thing.names] for thing in truth.things]
    return {"cells": truth.cells.tolist(), "things": things}


def _loaded(row: Mapping[Any, Any], table: pd.DataFrame, layers: int, top: int) -> SampleLens:
    shape = (layers, int(row["vision"]), top)
    if len(table) != int(np.prod(shape)):
        raise ValueError(f"sample '{row['sample']}' must have {int(np.prod(shape))} words, got {len(table)}")
    ids = table["id"].to_numpy(dtype=np.int32).reshape(shape)
    shares = table["share"].to_numpy(dtype=np.float32).reshape(shape)
    truth = tuple(
        Truth(
            np.array(one["cells"], dtype=np.int16),
            tuple(Thing(color, tuple(names)) for color, *names in one["things"]),
        )
        for one in json.loads(str(row["truth"]))
    )
    references = tuple(str(text) for text in row["references"])
    return SampleLens(
        str(row["sample"]), str(row["prompt"]), references, str(row["tiles"]), ids, shares, truth
    )
