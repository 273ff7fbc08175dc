"""The verbs for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from PIL import Image

from avlprof.errors import UserError
from avlprof.models import LoadedModel, load_model
from avlprof.pictures import ImageLike, own_task, save_pictures
from avlprof.registry import unknown
from avlprof.runs import RunDirectory, RunMeta
from avlprof.tasks import Sample, Task, load_task
from avlprof.tasks.splits import ALL
from avlprof.traced import RUNS, Run, latest_run
from avlprof.tracing import RecordOptions, estimate_bytes, trace_samples
from avlprof.tracing.trace import Progress, run_meta

__all__ = ["Run", "TracePlan", "latest_run", "plan_trace", "trace"]

ROWS = ("default", "all")


@dataclass(frozen=True)
class TracePlan:
    """A trace that is ready to start; `estimated_bytes` is the disk space that it may take."""

    loaded: LoadedModel
    task: Task
    samples: tuple[Sample, ...]
    split: str
    out: Path
    meta: RunMeta
    estimated_bytes: int
    options: RecordOptions = field(default_factory=RecordOptions)

    def run(self, progress: Progress | None = None) -> Run:
        """Trace what `out` does not hold yet."""
        try:
            directory = trace_samples(
                self.loaded,
                self.task,
                self.samples,
                self.out,
                split=self.split,
                max_new_tokens=self.meta.max_new_tokens,
                options=self.options,
                progress=progress,
            )
        finally:
            if (self.out / "meta.json").is_file():
                save_pictures(self.out, self.samples)
        return Run(directory)


def plan_trace(
    model: str | LoadedModel = "tiny",
    task: str | Task = "shapes",
    samples: int | None = 64,
    *,
    split: str = "search",
    image: ImageLike | Sequence[ImageLike] = (),
    prompt: str | None = None,
    out: Path | str | None = None,
    max_new_tokens: int | None = None,
    rows: str = "default",
    vision_rows: int = 64,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TracePlan:
    """Load what a trace needs and check it, without tracing; arguments as in `trace`."""
    if rows not in ROWS:
        raise unknown("kind of rows", rows, ROWS)
    if vision_rows < 0:
        raise UserError(f"vision_rows must be 0 or more, got {vision_rows}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    images = [image] if isinstance(image, str | Path | Image.Image) else list(image)
    if images or prompt is not None:
        task, split, samples = own_task(images, prompt), ALL, None
    elif isinstance(task, str):
        task = load_task(task)
    chosen = task.samples(split, samples)
    loaded = (
        model
        if isinstance(model, LoadedModel)
        else load_model(
            model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
    )
    options = RecordOptions(rows=rows, vision_rows=vision_rows)
    meta = run_meta(loaded, task, split, max_new_tokens or task.max_new_tokens, options)
    encoding = loaded.adapter.encode([chosen[0].prompt], [chosen[0].open_images()])
    vision = int(loaded.adapter.vision_mask(encoding["input_ids"]).sum())
    folder = Path(out) if out is not None else _default_out(loaded, task, split, meta)
    size = estimate_bytes(meta, vision, len(chosen))
    return TracePlan(loaded, task, tuple(chosen), split, folder, meta, size, options)


def trace(
    model: str | LoadedModel = "tiny",
    task: str | Task = "shapes",
    samples: int | None = 64,
    *,
    split: str = "search",
    image: ImageLike | Sequence[ImageLike] = (),
    prompt: str | None = None,
    out: Path | str | None = None,
    max_new_tokens: int | None = None,
    rows: str = "default",
    vision_rows: int = 64,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Let a model answer samples and record where it looks; the same call resumes.

    Args:
        model: alias, hub id, local folder, or a model loaded already (then the options that
            concern loading are not used).
        task: what `avlprof.tasks.load_task` takes, or a task.
        samples: how many, from the first of the split; None is the whole split.
        split: `search` or `held-out`, or what the task has.
        image: your own picture (or several for one prompt), in place of a task; with `prompt`.
        prompt: the question about your own picture.
        out: run directory; by default one below `runs/` that is new or holds the same run.
        max_new_tokens: longest answer; by default the task's.
        rows: `default` records all text rows and `vision_rows` vision rows of a prompt; `all`
            records every row.
        device, dtype, revision, trust_remote_code: as in `avlprof.models.load_model`.
        progress: called with samples done and samples wanted.

    Raises:
        UserError: a name that is not known, a picture that cannot be read, a model whose
            attention cannot be switched, or a run directory that holds another run.
    """
    plan = plan_trace(
        model,
        task,
        samples,
        split=split,
        image=image,
        prompt=prompt,
        out=out,
        max_new_tokens=max_new_tokens,
        rows=rows,
        vision_rows=vision_rows,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return plan.run(progress)


def _default_out(loaded: LoadedModel, task: Task, split: str, meta: RunMeta) -> Path:
    """`runs/<model>-<task>`, with the split unless it is the usual one, and a number if that is taken."""
    parts = [Path(loaded.name).name, task.name, "" if split in ("search", ALL) else split]
    text = "-".join(part for part in parts if part)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in text)
    for number in count(1):
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or (
            (path / "meta.json").is_file() and not RunDirectory(path).meta.differences(meta)
        ):
            break
    return path
