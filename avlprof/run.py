"""A traced run, as notebooks and commands use it, and its pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from PIL import Image

from avlprof.analysis import Profile
from avlprof.analysis.lens import Lens
from avlprof.budgets.resolve import resolve
from avlprof.errors import UserError
from avlprof.files import checked_path, write_text
from avlprof.models.chat import one_line
from avlprof.models.identity import listed, settings_differences
from avlprof.runs import RunDirectory, RunMeta
from avlprof.runs.directory import Scores
from avlprof.tasks import Sample, Task, load_task
from avlprof.tasks.source import picture_source
from avlprof.tasks.splits import ALL
from avlprof.tasks.text import printable
from avlprof.watch import SILENT, Watch

if TYPE_CHECKING:
    from avlprof.explore import Explorer, Side
    from avlprof.models import LoadedModel
    from avlprof.policy import Policy

ImageLike = str | Path | Image.Image
NAME = "pictures"


def picture_task(images: ImageLike | Sequence[ImageLike], prompt: str | None) -> Task:
    """A task of one sample: your own picture, or several, and a prompt.

    The sample's id comes from prompt and pixels, so that tracing it again adds nothing.

    Raises:
        UserError: a picture or the prompt is missing, or a picture cannot be read.
    """
    images = [images] if isinstance(images, str | Path | Image.Image) else list(images)
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
    (entry,) = find_samples(run, [sample], task)
    return [picture for message in entry.messages() for picture in message.pictures()]


def find_samples(run: RunDirectory, ids: Sequence[str], task: Task | None = None) -> list[Sample]:
    """Traced samples as they were asked, in the order of `ids`: from `task`, or from the run's own.

    Raises:
        UserError: the task is not to be had, or has no sample of such an id.
    """
    if task is None and run.meta.task == NAME:
        prompts = dict(run.samples()[["sample", "prompt"]].itertuples(index=False, name=None))
        noted = _noted(run.path)
        known = {
            name: Sample(name, tuple(Path(path) for path in noted[name]), str(prompts[name]))
            for name in ids
            if name in noted and name in prompts
        }
    else:
        try:
            task = task or load_task(run.meta.task)
        except UserError as error:
            raise UserError(f"the pictures of run {run.path} need its task ({error}); give task") from None
        known = {entry.id: entry for entry in task.samples(run.meta.split, len(run.samples()))}
    for name in ids:
        if name not in known:
            where = f"task '{run.meta.task if task is None else task.name}'"
            raise UserError(f"sample '{name}' of run {run.path} is not in {where}; give its own task")
    return [known[name] for name in ids]


def _noted(run: Path) -> dict[str, list[str]]:
    path = run / f"{NAME}.jsonl"
    if not path.is_file():
        return {}
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {str(entry["id"]): [str(image) for image in entry["images"]] for entry in entries}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); delete it and give the task") from None


RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """A traced run: its tables, its scores, its pictures and its profile."""

    directory: RunDirectory

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in a directory; `UserError` when there is none, or its tables are damaged."""
        run = cls(RunDirectory(checked_path(path, "run")))
        run.directory.check()
        return run

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.directory.path

    @property
    def meta(self) -> RunMeta:
        """With what it was traced."""
        return self.directory.meta

    def profile(self, watch: Watch = SILENT) -> Profile:
        """What the model attends to, per layer; computed once and saved in the run directory."""
        return Profile.of(self.directory, watch)

    def samples(self) -> pd.DataFrame:
        """One row a sample; see `avlprof.runs.RunDirectory`."""
        return self.directory.samples()

    def stats(self) -> pd.DataFrame:
        """One row per sample, layer, head, phase and kind of query row."""
        return self.directory.stats()

    def scores(self, sample: str, names: Collection[str] = ()) -> Scores:
        """Attention that single tokens of a sample received, by kind of row; of `names` alone, if given."""
        return self.directory.scores(sample, names)

    def pictures(self, sample: str, task: Task | str | None = None) -> list[Image.Image]:
        """The pictures of a traced sample.

        They are not stored in a run, but found again: by the paths that the run noted, else in
        its task by the name that it noted, else in `task`. `UserError` when that fails.
        """
        return find_pictures(self.directory, sample, load_task(task) if isinstance(task, str) else task)

    def explore(
        self,
        samples: int | Sequence[str] = 16,
        *,
        against: Run | None = None,
        policy: Policy | None = None,
        loaded: LoadedModel | None = None,
        task: Task | str | None = None,
        lens: Lens | Path | str | None = None,
        watch: Watch = SILENT,
    ) -> Explorer:
        """An interactive page: choose a word and see where it looks, or a patch and see who looks at it.

        The last line of a notebook's cell shows it; `save` writes it.

        Args:
            samples: how many from the first, or the ids of those to show.
            against: another run, whose same samples stand beside.
            policy: run the samples under it once more, with `loaded`, the run's own model, and show
                beside the run what it keeps, computes and drops, and where its attention goes.
            task: where samples and pictures are, if the run cannot tell.
            lens: what the vision tokens of the run's samples say (`avlprof.lens`), or the folder of it.
            watch: its phase `explore` counts samples that were run under the policy.

        Raises:
            UserError: a sample was not traced, model or policy do not fit, or both a run and a policy
                are to stand beside.
        """
        from avlprof.explore import Explorer, Side
        from avlprof.explore.data import records

        if against is not None and policy is not None:
            raise UserError("an explorer shows a run beside another or beside a policy; leave one out")
        ids = self._chosen(samples)
        source = load_task(task) if isinstance(task, str) else task
        names = _labels(self.meta, None if against is None else against.meta)
        sides = [Side(names[0], self.meta, records(self.directory, ids), lens=self._lens(lens))]
        if against is not None:
            sides.append(Side(names[1], against.meta, records(against.directory, ids)))
        if policy is not None:
            if loaded is None:
                raise UserError("a policy is explored by running the model under it; give loaded")
            self.check_model(loaded)
            sides.append(self._under(policy, loaded, find_samples(self.directory, ids, source), watch))
        return Explorer.of(sides, ids, lambda sample: find_pictures(self.directory, sample, source))

    def _lens(self, lens: Lens | Path | str | None) -> Lens | None:
        found = Lens.open(lens) if isinstance(lens, str | Path) else lens
        if found is not None:
            theirs = (found.meta["model"], found.meta["model_hash"])
            if theirs != (self.meta.model, self.meta.model_hash):
                raise UserError(
                    f"the lens is of {' '.join(theirs).strip()}, run {self.path} was traced on "
                    f"{self.meta.model} {self.meta.model_hash}; read this one"
                )
        return found

    def _chosen(self, samples: int | Sequence[str]) -> list[str]:
        traced = self.directory.ids()
        if isinstance(samples, int):
            if samples < 1:
                raise UserError(f"samples must be at least 1, got {samples}")
            return traced[:samples]
        ids = [samples] if isinstance(samples, str) else list(samples)
        missing = next((sample for sample in ids if sample not in traced), None)
        if missing is not None:
            raise UserError(f"sample '{missing}' is not in run {self.path}")
        return ids

    def _under(self, policy: Policy, loaded: LoadedModel, samples: Sequence[Sample], watch: Watch) -> Side:
        from avlprof.explore import Side
        from avlprof.explore.states import run_under

        if policy.allocator is not None:
            policy = resolve(policy, self.profile(watch).evidence())
        found = run_under(loaded, samples, policy, self.meta, watch)
        label = policy.name or policy.hash
        return Side(
            label,
            self.meta,
            {name: record for name, (record, _) in found.items()},
            {name: states.packed() for name, (_, states) in found.items()},
            label,
        )

    def check_model(self, loaded: LoadedModel) -> None:
        """`UserError` when the run was traced on another model, or another state of it."""
        if not self._is_of(loaded):
            theirs = f"{loaded.source} {loaded.revision or ''}".strip()
            ours = f"{self.meta.model} {self.meta.model_hash}".strip()
            raise UserError(
                f"run {self.path} was traced on {ours}, the model here is {theirs}; trace this one"
            )
        if different := self._other_settings(loaded):
            raise UserError(
                f"run {self.path} was traced under other settings of the model ({listed(different)}); "
                "trace this one"
            )

    def is_of(self, loaded: LoadedModel) -> bool:
        """Whether the run was traced on this model in this state."""
        return self._is_of(loaded) and not self._other_settings(loaded)

    def _other_settings(self, loaded: LoadedModel) -> list[str]:
        """Settings of the model that differ; version 0.1.0 noted none."""
        noted = self.meta.checkpoint
        return settings_differences(noted, loaded.settings) if noted else []

    def _is_of(self, loaded: LoadedModel) -> bool:
        return (self.meta.model, self.meta.model_hash) == (loaded.source, loaded.revision or "")


def _labels(here: RunMeta, other: RunMeta | None) -> tuple[str, str]:
    """What tells two runs apart, at best in a word; `dense` for a run without a policy."""
    mine = here.policy_label or "dense"
    if other is None:
        return mine, ""
    theirs = other.policy_label or "dense"
    if here.model != other.model or mine == theirs:
        mine, theirs = f"{here.model}, {mine}", f"{other.model}, {theirs}"
    return (mine, theirs) if mine != theirs else (f"{mine} (this run)", f"{theirs} (the other)")


def latest_run(
    root: Path | str = RUNS, *, loaded: LoadedModel | None = None, task: str | None = None
) -> Run | None:
    """The run under `root` that was written to last and has samples; of this model and task, if given.

    For a model only dense runs count: what it attends to under a policy is not what it needs.
    """
    written = []
    for path in Path(root).glob("*/meta.json"):
        parts = [part.stat().st_mtime for part in path.parent.glob("samples-*.parquet")]
        if parts:
            written.append((max(parts), path.parent))
    for _, folder in sorted(written, reverse=True):
        run = Run(RunDirectory(folder))
        try:
            dense = loaded is None or (run.is_of(loaded) and not run.meta.policy)
            fits = dense and task in (None, run.meta.task)
        except UserError:
            continue
        if fits:
            return run
    return None
