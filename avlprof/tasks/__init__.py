"""Samples to ask a model about, and the metrics that judge its answers."""

from avlprof.tasks.load import TASKS, load_task
from avlprof.tasks.metrics import METRICS, Metric, load_metric
from avlprof.tasks.presets import Preset, load_preset, presets
from avlprof.tasks.sample import Sample
from avlprof.tasks.task import Task
from avlprof.tasks.turn import Message, Turn

__all__ = [
    "METRICS",
    "TASKS",
    "Message",
    "Metric",
    "Preset",
    "Sample",
    "Task",
    "Turn",
    "load_metric",
    "load_preset",
    "load_task",
    "presets",
]
