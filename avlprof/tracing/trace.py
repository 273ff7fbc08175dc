"""Trace samples into a run directory, resumable by sample id."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from avlprof.attention.modality import prompt_shapes
from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.runs import RunDirectory, RunMeta, RunWriter
from avlprof.tasks import Sample, Task
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.recorder import record
from avlprof.versions import versions

FLUSH_SECONDS = 10.0
FLUSH_SAMPLES = 32
Progress = Callable[[int, int], None]


def run_meta(
    loaded: LoadedModel, task: Task, split: str, max_new_tokens: int, options: RecordOptions
) -> RunMeta:
    """The settings of a run, as its `meta.json` records them."""
    adapter = loaded.adapter
    return RunMeta(
        model=loaded.source,
        revision=loaded.revision or "",
        model_hash=loaded.revision or "",
        family=adapter.family,
        layers=adapter.layers,
        heads=adapter.heads,
        kv_heads=adapter.kv_heads,
        head_dim=adapter.head_dim,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.model.device),
        task=task.name,
        metric=task.metric,
        split=split,
        max_new_tokens=max_new_tokens,
        rows=options.rows,
        vision_rows=options.vision_rows,
        coverage_rows=options.coverage_rows,
        top_share=options.top_share,
        text_sink=options.text_sink,
        coverages=options.coverages,
        distances=options.distances,
        lags=options.lags,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def estimate_bytes(meta: RunMeta, vision: int, samples: int) -> int:
    """Upper estimate of a run's size on disk: scores of full-length answers and the stats table."""
    scores = 4 * meta.layers * vision * (2 + meta.max_new_tokens)
    row = 8 * (12 + len(meta.coverages) + len(meta.lags)) + 4 * (len(meta.distances) + 1)
    return samples * (scores + meta.layers * meta.heads * 5 * row)


def trace_samples(
    loaded: LoadedModel,
    task: Task,
    samples: Sequence[Sample],
    out: Path,
    *,
    split: str,
    max_new_tokens: int | None = None,
    options: RecordOptions | None = None,
    progress: Progress | None = None,
) -> RunDirectory:
    """Generate an answer to every sample and record the attention on the way.

    Samples whose ids are in `out` already are skipped, so the same call resumes. What is traced
    is on disk every few seconds, and on Ctrl-C.

    Args:
        progress: called with samples done and samples wanted, once at the start and after each.

    Raises:
        UserError: `out` holds another run, or a picture cannot be read.
    """
    options = options or RecordOptions()
    limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {limit}")
    ids = [sample.id for sample in samples]
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"sample ids must be unique, '{twice}' occurs twice in task '{task.name}'")
    writer = RunWriter(out, run_meta(loaded, task, split, limit, options))
    try:
        _trace_missing(loaded, samples, limit, options, writer, progress)
    finally:
        try:
            writer.flush()
        finally:
            writer.close()
    return RunDirectory(out)


def _trace_missing(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    limit: int,
    options: RecordOptions,
    writer: RunWriter,
    progress: Progress | None,
) -> None:
    done = writer.done()
    todo = [sample for sample in samples if sample.id not in done]
    finished = len(samples) - len(todo)
    flushed = time.monotonic()
    if progress:
        progress(finished, len(samples))
    for sample in todo:
        _trace_one(loaded, sample, limit, options, writer)
        finished += 1
        if progress:
            progress(finished, len(samples))
        if writer.pending >= FLUSH_SAMPLES or time.monotonic() - flushed > FLUSH_SECONDS:
            writer.flush()
            flushed = time.monotonic()


def _trace_one(
    loaded: LoadedModel, sample: Sample, limit: int, options: RecordOptions, writer: RunWriter
) -> None:
    started = time.monotonic()
    adapter = loaded.adapter
    encoding = adapter.encode([sample.prompt], [sample.open_images()])
    length = encoding["input_ids"].shape[1]
    with record(loaded.model, options) as recorder, torch.inference_mode():
        ids = loaded.model.generate(**encoding, max_new_tokens=limit, do_sample=False)
    found = recorder.records[0]
    shape = prompt_shapes(found.modality[None])[0]
    grid = adapter.vision_grid(encoding) if len(sample.images) == 1 else None
    stats = [{"sample": sample.id, **row} for row in found.frame()]
    writer.add(
        {
            "sample": sample.id,
            "group": sample.group,
            "prompt": sample.prompt,
            "references": list(sample.answers),
            "answer": adapter.decode(ids[:, length:])[0],
            "tokens": loaded.processor.tokenizer.convert_ids_to_tokens(ids[0, length:].tolist()),
            "system": shape.system,
            "vision": shape.vision,
            "text": shape.text,
            "generated": int(ids.shape[1] - length),
            "grid_rows": grid[0] if grid else 0,
            "grid_cols": grid[1] if grid else 0,
            "seconds": time.monotonic() - started,
        },
        stats,
        found.scores(),
    )
