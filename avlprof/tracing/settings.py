"""The settings of a run, and what it will take on disk."""

from __future__ import annotations

import datetime

from avlprof.models import LoadedModel
from avlprof.runs import RunMeta
from avlprof.tasks import Task
from avlprof.tracing.options import RecordOptions
from avlprof.versions import versions


def run_meta(
    loaded: LoadedModel,
    task: Task,
    split: str,
    max_new_tokens: int,
    options: RecordOptions,
    *,
    forced: bool = False,
    policy: str = "",
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
        forced=forced,
        policy=policy,
        rows=options.rows,
        vision_rows=options.vision_rows,
        coverage_rows=options.coverage_rows,
        per_head=options.per_head,
        history=options.history,
        top_share=options.top_share,
        text_sink=options.text_sink,
        coverages=options.coverages,
        distances=options.distances,
        lags=options.lags,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def estimate_bytes(
    meta: RunMeta, vision: int, samples: int, answer_tokens: int | None = None, text: int = 0
) -> int:
    """Upper estimate of a run's size on disk: scores of full-length answers and the stats table.

    With `per_head` these are the scores of every head beside their mean, and a row a head.

    Args:
        vision: vision tokens of a prompt.
        answer_tokens: tokens of the longest answer; by default `meta.max_new_tokens`.
        text: text tokens of a prompt, of which a run with `history` stores scores.
    """
    tokens = meta.max_new_tokens if answer_tokens is None else answer_tokens
    scores = vision * (2 + tokens + (meta.rows == "all"))
    if meta.history is not None:
        scores += text + tokens
    row = 8 * (12 + len(meta.coverages) + len(meta.lags)) + 4 * (len(meta.distances) + 1)
    heads = meta.heads if meta.per_head else 0
    return samples * meta.layers * (4 * scores * (1 + heads) + 5 * row * max(heads, 1))
