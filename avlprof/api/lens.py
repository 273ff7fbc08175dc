"""Read what vision tokens say behind each layer, over samples of a task."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avlprof.analysis.lens import LOOSE, META, SCHEMA, Lens
from avlprof.analysis.naming import SampleLens
from avlprof.errors import UserError
from avlprof.files import checked_path
from avlprof.locks import FolderLock
from avlprof.models import LoadedModel, ModelSpec, load_model
from avlprof.models.tiles import dump_tiles
from avlprof.tasks import Sample, Task, load_task
from avlprof.tasks.splits import SEARCH
from avlprof.tasks.text import printable
from avlprof.tasks.truth import truth_of
from avlprof.tracing.lens import Readout, find_readout, read_vision
from avlprof.versions import versions
from avlprof.watch import SILENT, Watch

SAMPLES = 16
"""How many samples are read where nobody says."""
FLUSH_SECONDS = 30.0


@dataclass(frozen=True)
class LensSettings:
    """How samples are read.

    Attributes:
        split: `search` or `held-out`, or what the task has; None is `search`, or its only split.
        layers: behind which layers; None is all that hand on a state of each token.
        top: words kept of each token and layer.
        batch_size: samples that run together; changes no number.

    Raises:
        UserError: a value is out of its range.
    """

    split: str | None = None
    layers: tuple[int, ...] | None = None
    top: int = 5
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise UserError(f"layers must be different ones, at least one, got {list(self.layers)}")

    def split_of(self, task: Task) -> str:
        """The split that samples are taken from."""
        if self.split is not None:
            return self.split
        return task.splits[0] if len(task.splits) == 1 else SEARCH


def lens(
    model: str | ModelSpec | LoadedModel = "tiny",
    task: str | Task = "shapes",
    samples: int | None = SAMPLES,
    settings: LensSettings | None = None,
    *,
    out: Path | str | None = None,
    watch: Watch = SILENT,
) -> Lens:
    """What the vision tokens of samples already say behind each layer (logit lens).

    The hidden state of each vision token goes through the model's own final norm and head, and the likeliest
    words are kept; see `avlprof.tracing.lens`.

    Args:
        model: alias, hub id, local folder, a `ModelSpec`, or a model loaded already.
        task: what `avlprof.tasks.load_task` takes, or a task; `avlprof.picture_task` makes one of
            your own picture.
        samples: how many, from the first of the split; None is the whole split.
        out: folder to write to; what it holds of these samples is not read again.
        watch: its phase `lens` counts samples.

    Raises:
        UserError: a name that is not known, a model without a head that reads states of tokens, a layer
            that it does not have, or a folder that holds another lens.
    """
    settings = settings or LensSettings()
    task = load_task(task) if isinstance(task, str) else task
    chosen = task.samples(settings.split_of(task), samples)
    folder = None if out is None else checked_path(out, "output")
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    readout = find_readout(loaded.adapter, loaded.adapter.encode_samples(chosen[:1]))
    meta = _meta(loaded, task, settings, _layers(settings, readout, loaded), readout.vocabulary)
    if folder is None:
        return _read(loaded, chosen, readout, Lens(meta, (), {}), settings.batch_size, None, watch)
    with FolderLock(folder):
        known = _known(folder, meta)
        return _read(loaded, chosen, readout, known, settings.batch_size, folder, watch)


def _layers(settings: LensSettings, readout: Readout, loaded: LoadedModel) -> tuple[int, ...]:
    for layer in settings.layers or ():
        if not 0 <= layer < loaded.adapter.layers:
            raise UserError(f"layers must be in 0 to {loaded.adapter.layers - 1}, got {layer}")
        if layer not in readout.layers:
            raise UserError(
                f"layer {layer} of '{loaded.name}' runs on the last token of a prompt alone, so vision "
                f"tokens say nothing behind it; the last that they reach is {max(readout.layers)}"
            )
    return tuple(sorted(settings.layers or readout.layers))


def _meta(
    loaded: LoadedModel, task: Task, settings: LensSettings, layers: tuple[int, ...], vocabulary: int
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": loaded.source,
        "model_hash": loaded.revision or "",
        "checkpoint": loaded.settings,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "task": task.name,
        "dataset": dict(task.provenance),
        "split": settings.split_of(task),
        "depth": loaded.adapter.layers,
        "layers": list(layers),
        "top": min(settings.top, vocabulary),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _known(folder: Path, meta: dict[str, Any]) -> Lens:
    """What a folder holds already; `UserError` when that was read otherwise."""
    if not (folder / META).is_file():
        return Lens(meta, (), {})
    there = Lens.open(folder)
    for name, value in meta.items():
        if name not in LOOSE and there.meta.get(name) != value:
            raise UserError(
                f"{folder} holds another lens ({name}: {there.meta.get(name)!r} there, {value!r} asked); "
                "give another folder"
            )
    return there


def _read(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    readout: Readout,
    known: Lens,
    batch_size: int,
    folder: Path | None,
    watch: Watch,
) -> Lens:
    """The samples that are known and those that are not, in the order asked; written now and then."""
    found, words = {one.id: one for one in known.samples}, dict(known.words)
    todo = [sample for sample in samples if sample.id not in found]
    saved, done = time.monotonic(), len(samples) - len(todo)
    watch.phase("lens", done, len(samples))

    def whole(ids: Sequence[str]) -> Lens:
        return Lens(known.meta, tuple(found[name] for name in ids if name in found), words)

    everything = list(dict.fromkeys([*found, *(sample.id for sample in samples)]))
    try:
        for start in range(0, len(todo), batch_size):
            for one in _batch(loaded, todo[start : start + batch_size], readout, known):
                found[one.id], done = one, done + 1
                words |= _texts(loaded, one, words)
            watch.phase("lens", done, len(samples))
            if folder is not None and time.monotonic() - saved > FLUSH_SECONDS:
                whole(everything).save(folder)
                saved = time.monotonic()
    finally:
        if folder is not None and todo and found:
            whole(everything).save(folder)
    return whole([sample.id for sample in samples])


def _batch(loaded: LoadedModel, samples: Sequence[Sample], readout: Readout, known: Lens) -> list[SampleLens]:
    chats = [sample.messages() for sample in samples]
    encoding = loaded.adapter.encode_chats(chats)
    names = [sample.id for sample in samples]
    spoken = read_vision(loaded, encoding, readout, known.layers, int(known.meta["top"]), names)
    layouts = loaded.adapter.vision_layout(encoding, chats)
    return [
        SampleLens(
            sample.id,
            printable(sample.prompt),
            tuple(map(printable, sample.answers)),
            dump_tiles(tiles),
            said.ids,
            said.shares,
            truth_of(sample),
        )
        for sample, said, tiles in zip(samples, spoken, layouts, strict=True)
    ]


def _texts(loaded: LoadedModel, one: SampleLens, words: dict[int, str]) -> dict[int, str]:
    """Texts of the tokens that are new: as the tokenizer writes them, or by name where that is no text."""
    tokenizer = loaded.processor.tokenizer
    new = [token for token in np.unique(one.ids).tolist() if token not in words]
    texts = {}
    for token in new:
        text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        piece = tokenizer.convert_ids_to_tokens(token)
        texts[token] = printable(text if text and "\ufffd" not in text else str(piece or f"<{token}>"))
    return texts
