"""The verbs for notebooks and scripts: trace, and what a traced run offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pandas as pd
from PIL import Image

from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.models import LoadedModel, load_model
from avlprof.pictures import ImageLike, find_pictures, own_task, save_pictures
from avlprof.registry import unknown
from avlprof.runs import RunDirectory, RunMeta
from avlprof.runs.directory import Scores
from avlprof.tasks import Sample, Task, load_task
from avlprof.tasks.splits import ALL
from avlprof.tracing import RecordOptions, estimate_bytes, trace_samples
from avlprof.tracing.trace import Progress, run_meta

RUNS = Path("runs")
ROWS = ("default", "all")


@dataclass(frozen=True)
class Run:
    """A traced run: its tables, its scores, its pictures and its profile."""

    directory: RunDirectory

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in a directory; `UserError` when there is none."""
        run = cls(RunDirectory(path))
        _ = run.meta
        return run

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.directory.path

    @property
    def meta(self) -> RunMeta:
        """With what it was traced."""
        return self.directory.meta

    def profile(self, progress: Progress | None = None) -> Profile:
        """What the model attends to, per layer; computed once and saved in the run directory."""
        return Profile.of(self.directory, progress)

    def samples(self) -> pd.DataFrame:
        """One row a sample; see `avlprof.runs.RunDirectory`."""
        return self.directory.samples()

    def stats(self) -> pd.DataFrame:
        """One row per sample, layer, head, phase and kind of query row."""
        return self.directory.stats()

    def scores(self, sample: str) -> Scores:
        """Attention that the vision tokens of a sample received, by kind of query row."""
        return self.directory.scores(sample)

    def pictures(self, sample: str, task: Task | str | None = None) -> list[Image.Image]:
        """The pictures of a traced sample.

        They are not stored in a run, but found again: by the paths that the run noted, else in
        its task by the name that it noted, else in `task`. `UserError` when that fails.
        """
        return find_pictures(self.directory, sample, load_task(task) if isinstance(task, str) else task)

    def check_model(self, loaded: LoadedModel) -> None:
        """`UserError` when the run was traced on another model, or another state of it."""
        if not self.is_of(loaded):
            theirs = f"{loaded.source} {loaded.revision or ''}".strip()
            ours = f"{self.meta.model} {self.meta.model_hash}".strip()
            raise UserError(
                f"run {self.path} was traced on {ours}, the model here is {theirs}; trace this one"
            )

    def is_of(self, loaded: LoadedModel) -> bool:
        """Whether the run was traced on this model in this state."""
        return (self.meta.model, self.meta.model_hash) == (loaded.source, loaded.revision or "")


def latest_run(
    root: Path | str = RUNS, *, loaded: LoadedModel | None = None, task: str | None = None
) -> Run | None:
    """The run under `root` that was written to last and has samples; of this model and task, if given."""
    found = []
    for path in Path(root).glob("*/meta.json"):
        parts = [part.stat().st_mtime for part in path.parent.glob("samples-*.parquet")]
        if parts:
            found.append((max(parts), path.parent))
    for _, folder in sorted(found, reverse=True):
        run = Run(RunDirectory(folder))
        try:
            fits = (loaded is None or run.is_of(loaded)) and task in (None, run.meta.task)
        except UserError:
            continue
        if fits:
            return run
    return None


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
