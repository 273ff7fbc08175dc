"""Trace samples into a run directory, resumable by sample id."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.models.references import reference
from avlprof.runs import RunDirectory, RunWriter, Shard
from avlprof.tasks import Sample, Task
from avlprof.tracing.batch import Traced, trace_batch
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.settings import run_meta

FLUSH_SECONDS = 10.0
FLUSH_SAMPLES = 32
FLUSH_BYTES = 1 << 30
Progress = Callable[[int, int], None]
Under = Callable[[], AbstractContextManager[object]]


def trace_samples(
    loaded: LoadedModel,
    task: Task,
    samples: Sequence[Sample],
    out: Path,
    *,
    split: str,
    max_new_tokens: int | None = None,
    options: RecordOptions | None = None,
    batch_size: int = 1,
    forced: bool = False,
    policy: str = "",
    under: Under = nullcontext,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> RunDirectory:
    """Generate an answer to every sample and record the attention on the way.

    Samples whose ids are in `out` already are skipped, so the same call resumes. What is traced
    is on disk every few seconds, and on Ctrl-C.

    Args:
        max_new_tokens: longest answer; by default the task's, and reference answers whole.
        batch_size: samples that run together. Each is recorded as if it ran alone.
        forced: trace over each sample's first reference answer, not over the model's own.
        policy: what `under` runs the model under, as `meta.json` shall name it.
        under: makes a context in which a batch runs, such as that of a policy.
        shard: this process's share, where several trace the same samples into `out`.
        progress: called with samples done and samples wanted of the share, once at the start and
            after each batch.

    Raises:
        UserError: `out` holds another run, a picture cannot be read, or with `forced` a sample
            has no reference answer.
    """
    options, shard = options or RecordOptions(), shard or Shard()
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    _check_ids(samples, task)
    limit = max_new_tokens or (0 if forced else task.max_new_tokens)
    if forced:
        for sample in samples:
            reference(sample)

    def traced(batch: Sequence[Sample]) -> list[Traced]:
        with under():
            return trace_batch(loaded, batch, limit, options, forced)

    meta = run_meta(loaded, task, split, limit, options, forced=forced, policy=policy)
    writer = RunWriter(out, meta, shard.prefix, shard.count)
    try:
        with _current(loaded.model.device):
            _trace_missing(traced, shard.of(samples), batch_size, writer, progress)
    finally:
        try:
            writer.flush()
        finally:
            writer.close()
    return RunDirectory(out)


def _check_ids(samples: Sequence[Sample], task: Task) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise UserError(f"sample ids must be unique, '{sample.id}' occurs twice in task '{task.name}'")
        seen.add(sample.id)


def _trace_missing(
    traced: Callable[[Sequence[Sample]], list[Traced]],
    samples: Sequence[Sample],
    batch_size: int,
    writer: RunWriter,
    progress: Progress | None,
) -> None:
    done = writer.done()
    todo = [sample for sample in samples if sample.id not in done]
    finished = len(samples) - len(todo)
    flushed = time.monotonic()
    if progress:
        progress(finished, len(samples))
    for start in range(0, len(todo), batch_size):
        for found in traced(todo[start : start + batch_size]):
            writer.add(found.sample, found.stats, found.scores)
            finished += 1
        if progress:
            progress(finished, len(samples))
        full = writer.pending >= FLUSH_SAMPLES or writer.pending_bytes >= FLUSH_BYTES
        if full or time.monotonic() - flushed > FLUSH_SECONDS:
            writer.flush()
            flushed = time.monotonic()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: kernels of Triton start there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
