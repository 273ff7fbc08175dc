"""What answers were generated with: the part of a result's `meta` that all results have."""

from __future__ import annotations

import datetime
from typing import Any

from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.versions import versions


def about(
    loaded: LoadedModel, task: Task, split: str, samples: int, limit: int, batch_size: int
) -> dict[str, Any]:
    """Model, task, split, counts, versions and time; `limit` is the longest answer in tokens."""
    return {
        "model": loaded.source,
        "revision": loaded.revision or "",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "task": task.name,
        "metric": task.metric,
        "split": split,
        "samples": samples,
        "max_new_tokens": limit,
        "batch_size": batch_size,
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
