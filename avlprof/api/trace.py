"""Trace samples of a task, with everything found or made that a trace needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from PIL import Image

from avlprof.errors import UserError
from avlprof.models import LoadedModel, load_model
from avlprof.models.answers import longest_reference
from avlprof.models.placement import own_device
from avlprof.policy import Policy, find_policy
from avlprof.run import RUNS, ImageLike, Run, latest_run, own_task, save_pictures
from avlprof.runs import RunDirectory, RunMeta, Shard
from avlprof.runtime.apply import apply
from avlprof.runtime.support import check_supported
from avlprof.tasks import Sample, Task, load_task
from avlprof.tasks.splits import ALL
from avlprof.tracing import RecordOptions, encode, estimate_bytes, run_meta, trace_samples
from avlprof.tracing.trace import Progress

__all__ = ["Run", "TracePlan", "latest_run", "plan_trace", "trace"]


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
    policy: Policy | None = None
    batch_size: int = 1
    shard: Shard = field(default_factory=Shard)

    def run(self, progress: Progress | None = None) -> Run:
        """Trace what `out` does not hold yet of this process's share."""
        try:
            directory = trace_samples(
                self.loaded,
                self.task,
                self.samples,
                self.out,
                split=self.split,
                max_new_tokens=self.meta.max_new_tokens or None,
                options=self.options,
                batch_size=self.batch_size,
                forced=self.meta.forced,
                policy=self.meta.policy,
                under=self._under,
                shard=self.shard,
                progress=progress,
            )
        finally:
            # one process notes the pictures of all, since they write the same file
            if self.shard.index == 0 and (self.out / "meta.json").is_file():
                save_pictures(self.out, self.samples)
        return Run(directory)

    def _under(self) -> AbstractContextManager[object]:
        return nullcontext() if self.policy is None else apply(self.loaded.model, self.policy)


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
    batch_size: int = 1,
    forced: bool = False,
    policy: Policy | str | Path | None = None,
    rows: str = "default",
    vision_rows: int = 64,
    per_head: bool = False,
    history: float | None = None,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    shard: Shard | None = None,
) -> TracePlan:
    """Load what a trace needs and check it, without tracing; arguments as in `trace`."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    options = RecordOptions(rows=rows, vision_rows=vision_rows, per_head=per_head, history=history)
    shard = shard or Shard()
    under = policy if policy is None or isinstance(policy, Policy) else find_policy(str(policy))
    if under is not None:
        check_supported(under)
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
            model,
            device=own_device(device, shard.local) if shard.count > 1 and device_map is None else device,
            device_map=device_map,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    )
    if under is not None:
        under.check_layers(loaded.adapter.layers)
    longest = longest_reference(loaded, chosen) if forced else max_new_tokens or task.max_new_tokens
    meta = run_meta(
        loaded,
        task,
        split,
        max_new_tokens or (0 if forced else task.max_new_tokens),
        options,
        forced=forced,
        policy="" if under is None else f"{under.name} {under.hash}".strip(),
    )
    ids = encode(loaded, chosen[:1])["input_ids"]
    vision = int(loaded.adapter.vision_mask(ids).sum())
    folder = Path(out) if out is not None else _default_out(loaded, task, split, meta, under)
    tokens = min(longest, meta.max_new_tokens or longest)
    size = estimate_bytes(meta, vision, len(chosen), tokens, text=ids.numel() - vision)
    return TracePlan(
        loaded, task, tuple(chosen), split, folder, meta, size, options, under, batch_size, shard
    )


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
    batch_size: int = 1,
    forced: bool = False,
    policy: Policy | str | Path | None = None,
    rows: str = "default",
    vision_rows: int = 64,
    per_head: bool = False,
    history: float | None = None,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    shard: Shard | None = None,
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
        max_new_tokens: longest answer; by default the task's, and with `forced` the whole reference.
        batch_size: samples that run together. The numbers are those of each alone.
        forced: trace over each sample's first reference answer in place of the model's own.
        policy: trace the model under a policy: a `Policy`, a YAML file or the name of a shipped one.
        rows: `default` records all text rows and `vision_rows` vision rows of a prompt; `all`
            records every row.
        per_head: store statistics and token scores of every query head; by default their mean.
        history: record A-VL's history scores of text tokens for this kept share of the text.
        device, device_map, dtype, revision, trust_remote_code: as in `avlprof.models.load_model`.
        shard: this process's share (`avlprof.runs.Shard.from_environment`), where several
            processes trace the same samples into `out`.
        progress: called with samples done and samples wanted, of the share.

    Raises:
        UserError: a name that is not known, a picture that cannot be read, a model whose
            attention cannot be switched, a run directory that holds another run, a policy that
            does not fit, or with `forced` a sample without reference answer.
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
        batch_size=batch_size,
        forced=forced,
        policy=policy,
        rows=rows,
        vision_rows=vision_rows,
        per_head=per_head,
        history=history,
        device=device,
        device_map=device_map,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        shard=shard,
    )
    return plan.run(progress)


def _default_out(loaded: LoadedModel, task: Task, split: str, meta: RunMeta, policy: Policy | None) -> Path:
    """`runs/<model>-<task>` and what is not as usual, with a number if that is taken."""
    parts = [Path(loaded.name).name, task.name, "" if split in ("search", ALL) else split]
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
