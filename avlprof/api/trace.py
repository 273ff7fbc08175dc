"""Trace samples of a task, with everything found or made that a trace needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from avlprof.launchers import Launch
from avlprof.launchers.queue import LEADER, Looking, Queue, Team
from avlprof.models import LoadedModel, ModelSpec, load_model
from avlprof.models.answers import longest_reference
from avlprof.models.placement import own_device
from avlprof.policy import Policy
from avlprof.run import RUNS, Run, save_pictures
from avlprof.runs import RunDirectory, RunMeta, Shard
from avlprof.runs.meta import check_free
from avlprof.runtime.apply import apply
from avlprof.runtime.support import check_runs
from avlprof.tasks import Sample, Task, load_task
from avlprof.tasks.splits import ALL, SEARCH
from avlprof.tracing import TraceSettings, encode, estimate_bytes, run_meta, trace_samples
from avlprof.watch import SILENT, Watch

SAMPLES = 64
"""How many samples are traced where nobody says."""
SHARES, MOST_SAMPLES = 4, 32
"""Tasks for each worker, as far as there are samples; most samples of a task."""
QUEUE = "AVLPROF_QUEUE"
"""Folder of the tasks, for a process that another one started to help it trace."""


@dataclass(frozen=True)
class TracePlan:
    """A trace that is ready to start; `estimated_bytes` is the disk space that it may take."""

    loaded: LoadedModel
    task: Task
    samples: tuple[Sample, ...]
    out: Path
    settings: TraceSettings
    estimated_bytes: int
    shard: Shard = field(default_factory=Shard)

    def run(self, watch: Watch = SILENT) -> Run:
        """Trace what `out` does not hold yet of this process's share."""
        try:
            directory = self._trace(watch)
        finally:
            # one process notes the pictures of all, since they write the same file
            if self.shard.index == 0 and (self.out / "meta.json").is_file():
                save_pictures(self.out, self.samples)
        return Run(directory)

    def lead(self, launch: Launch, words: Sequence[str], watch: Watch = SILENT) -> Run:
        """As `run`, with others.

        Args:
            launch: how many work, and what starts the others.
            words: of the command line that makes the same plan in them; see `serve`.
            watch: its phase `trace` counts samples of all.
        """
        there = set(RunDirectory(self.out).ids()) if (self.out / "meta.json").is_file() else set()
        todo = [sample for sample in self.samples if sample.id not in there]
        size = self.settings.batch_size
        size *= max(min(len(todo) // (SHARES * launch.workers), MOST_SAMPLES) // size, 1)
        parts = {f"{start:06d}": todo[start : start + size] for start in range(0, len(todo), size)}
        if not parts:
            return self.run(watch)
        check_free(self.out, run_meta(self.loaded, self.task, self.settings))
        plan, total = replace(self, shard=Shard(0, launch.workers, member=LEADER)), len(self.samples)

        def serve(name: str, look: Callable[[], None]) -> None:
            replace(plan, samples=tuple(parts[name]))._trace(Looking(look))

        def tell(left: set[str]) -> None:
            watch.phase("trace", total - sum(len(parts[name]) for name in left), total)

        words = ["-m", "avlprof", *words, "--out", str(self.out.resolve())]
        team = Team(
            launch,
            self.out,
            lambda queue: words,
            lambda queue, number: {QUEUE: str(queue), "RANK": f"{number}", "WORLD_SIZE": f"{launch.workers}"},
        )
        tasks = {name: {"samples": [sample.id for sample in part]} for name, part in parts.items()}
        try:
            with team:
                team.work(tasks, serve, tell)
        finally:
            for lock in self.out.glob(".lockw*"):  # of members, whose names nobody has again
                lock.unlink(missing_ok=True)
            if (self.out / "meta.json").is_file():
                save_pictures(self.out, self.samples)
        return Run(RunDirectory(self.out))

    def serve(self, queue: Queue) -> int:
        """Trace what a queue asks for until who leads is gone; how many tasks."""
        done, samples = 0, {sample.id: sample for sample in self.samples}
        for taken in queue.tasks(self.shard.member):
            asked = taken.read()
            if asked is not None:
                replace(self, samples=tuple(samples[name] for name in asked["samples"]))._trace()
                taken.done()
                done += 1
        return done

    def _trace(self, watch: Watch = SILENT) -> RunDirectory:
        return trace_samples(
            self.loaded,
            self.task,
            self.samples,
            self.out,
            self.settings,
            under=self._under,
            shard=self.shard,
            watch=watch,
        )

    def _under(self) -> AbstractContextManager[object]:
        policy = self.settings.policy
        return nullcontext() if policy is None else apply(self.loaded.model, policy)


def plan_trace(
    model: str | ModelSpec | LoadedModel = "tiny",
    task: str | Task = "shapes",
    samples: int | None = SAMPLES,
    settings: TraceSettings | None = None,
    *,
    out: Path | str | None = None,
    shard: Shard | None = None,
) -> TracePlan:
    """Load what a trace needs and check it, without tracing; arguments as in `trace`."""
    settings, shard = (settings or TraceSettings()).resolved(), shard or Shard()
    policy = settings.policy if isinstance(settings.policy, Policy) else None
    if policy is not None:
        check_runs(policy)
    task = load_task(task) if isinstance(task, str) else task
    chosen = task.samples(settings.split_of(task), samples)
    loaded = model if isinstance(model, LoadedModel) else load_model(_own(model, shard))
    if policy is not None:
        policy.check_layers(loaded.adapter.layers)
    meta = run_meta(loaded, task, settings)
    longest = (
        longest_reference(loaded, chosen)
        if settings.forced
        else settings.max_new_tokens or task.max_new_tokens
    )
    ids = encode(loaded, chosen[:1])["input_ids"]
    vision = int(loaded.adapter.vision_mask(ids).sum())
    tokens = min(longest, meta.max_new_tokens or longest)
    size = estimate_bytes(meta, vision, len(chosen), tokens, text=ids.numel() - vision)
    folder = Path(out) if out is not None else _default_out(loaded, task, meta, policy)
    return TracePlan(loaded, task, tuple(chosen), folder, settings, size, shard)


def trace(
    model: str | ModelSpec | LoadedModel = "tiny",
    task: str | Task = "shapes",
    samples: int | None = SAMPLES,
    settings: TraceSettings | None = None,
    *,
    out: Path | str | None = None,
    shard: Shard | None = None,
    watch: Watch = SILENT,
) -> Run:
    """Let a model answer samples and record where it looks; the same call resumes.

    Args:
        model: alias, hub id, local folder, a `ModelSpec`, or a model loaded already.
        task: what `avlprof.tasks.load_task` takes, or a task; `avlprof.picture_task` makes one of
            your own picture.
        samples: how many, from the first of the split; None is the whole split.
        settings: over which answers, how long, under what policy, and what is recorded.
        out: run directory; by default one below `runs/` that is new or holds the same run.
        shard: this process's share (`avlprof.runs.Shard.from_environment`), where several
            processes trace the same samples into `out`.
        watch: its phase `trace` counts samples of the share.

    Raises:
        UserError: a name that is not known, a picture that cannot be read, a model whose
            attention cannot be switched, a run directory that holds another run, a policy that
            does not fit, or reference answers are wanted and a sample has none.
    """
    return plan_trace(model, task, samples, settings, out=out, shard=shard).run(watch)


def _own(model: str | ModelSpec, shard: Shard) -> ModelSpec:
    """Which model to load; of the processes of one machine each takes a GPU of its own."""

    spec = model if isinstance(model, ModelSpec) else ModelSpec(model)
    if shard.count > 1 and spec.device_map is None:
        return replace(spec, device=own_device(spec.device, shard.local))
    return spec


def _default_out(loaded: LoadedModel, task: Task, meta: RunMeta, policy: Policy | None) -> Path:
    """`runs/<model>-<task>` and what is not as usual, with a number if that is taken."""
    parts = [Path(loaded.name).name, task.name, "" if meta.split in (SEARCH, ALL) else meta.split]
    parts += [policy.name or policy.hash if policy else "", "forced" if meta.forced else ""]
    text = "-".join(part for part in parts if part)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in text)
    for number in count(1):
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        if (path / "meta.json").is_file():
            if not RunDirectory(path).meta.differences(meta):
                break
        # a folder with hidden files alone is one that another process has just begun
        elif not path.exists() or not any(not entry.name.startswith(".") for entry in path.iterdir()):
            break
    return path
