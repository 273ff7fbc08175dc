"""Pictures of samples: a task of one's own picture, and finding the pictures of a run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.runs import RunDirectory
from avlprof.tasks import Sample, Task, load_task
from avlprof.tasks.source import picture_source
from avlprof.tasks.splits import ALL
from avlprof.tasks.text import printable

ImageLike = str | Path | Image.Image
NAME = "pictures"


def own_task(images: Sequence[ImageLike], prompt: str | None) -> Task:
    """A task of one sample: these pictures and this prompt.

    The sample's id comes from prompt and pixels, so that tracing it again adds nothing.

    Raises:
        UserError: a picture or the prompt is missing, or a picture cannot be read.
    """
    if not images:
        raise UserError("prompt needs a picture; give image, or leave prompt out to trace a task")
    if prompt is None or not prompt.strip():
        raise UserError("image needs a prompt that is not empty; give prompt")
    sources = tuple(
        image if isinstance(image, Image.Image) else picture_source(image, Path(), "image")
        for image in images
    )
    first = sources[0]
    stem = printable(first.stem) if isinstance(first, Path) else "image"
    opened = Sample(stem, sources, prompt).open_images()
    digest = hashlib.sha256(prompt.encode())
    for picture in opened:
        digest.update(repr(picture.size).encode() + picture.tobytes())
    sample = Sample(f"{stem}-{digest.hexdigest()[:8]}", sources, prompt)
    return Task(name=NAME, metric="exact_match", splits=(ALL,), stream=lambda split: [sample])


def save_pictures(run: Path, samples: Sequence[Sample]) -> None:
    """Note in a run directory where the pictures of its samples lie, as far as they are files."""
    known = _noted(run)
    new = {}
    for sample in samples:
        sources = [source for turn in sample.conversation() for source in turn.sources(sample.id)]
        paths = [str(source.resolve()) for source in sources if isinstance(source, Path)]
        if paths and len(paths) == len(sources):
            new[sample.id] = paths
    if any(known.get(name) != paths for name, paths in new.items()):
        lines = (json.dumps({"id": name, "images": paths}) for name, paths in (known | new).items())
        write_text(run / f"{NAME}.jsonl", "".join(f"{line}\n" for line in lines))


def find_pictures(run: RunDirectory, sample: str, task: Task | None = None) -> list[Image.Image]:
    """The pictures of a traced sample, from `task`, or from where the run says they come from.

    Those of its whole conversation, frames of videos included, in the order of the run's `tiles`.

    Raises:
        UserError: they cannot be found or read.
    """
    noted = _noted(run.path).get(sample)
    if task is None and noted is not None:
        return Sample(sample, tuple(Path(path) for path in noted), "").open_images()
    if task is None:
        try:
            task = load_task(run.meta.task)
        except UserError as error:
            raise UserError(f"the pictures of run {run.path} need its task ({error}); give task") from None
    most = len(run.samples())
    for found in task.samples(run.meta.split, most):
        if found.id == sample:
            return [picture for message in found.messages() for picture in message.pictures()]
    raise UserError(f"sample '{sample}' of run {run.path} is not in task '{task.name}'; give its own task")


def _noted(run: Path) -> dict[str, list[str]]:
    path = run / f"{NAME}.jsonl"
    if not path.is_file():
        return {}
    entries = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {entry["id"]: entry["images"] for entry in entries}
