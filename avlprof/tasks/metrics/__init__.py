"""Metrics of an answer against reference answers, one a file."""

from __future__ import annotations

from avlprof.registry import Registry
from avlprof.tasks.metrics._base import Metric

__all__ = ["METRICS", "Metric", "load_metric"]

METRICS: Registry[Metric] = Registry(
    "metric",
    {
        name: f"avlprof.tasks.metrics.{name}:{name}"
        for name in (
            *("exact_match", "vqa_accuracy", "anls", "relaxed_accuracy"),
            *("token_f1", "rouge_l", "contains"),
        )
    },
)


def load_metric(name: str) -> Metric:
    """The metric of a name; `UserError` with the nearest names when it is not known."""
    return METRICS.get(name)
