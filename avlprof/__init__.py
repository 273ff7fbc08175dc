"""Trace, tune and run adaptive attention policies for large vision-language models.

`trace` records where a model looks and gives a `Run`, `Run.profile()` sums it up layer by layer,
its `derive()` and `tune` make a `Policy`, `apply` runs a model under one (`wrap` for good), `evaluate`
compares policies with the dense model, `compare` at equal bytes, `knockout` closes routes of attention,
and `record` measures a `generate()` of your own. `docs/python.md` shows each of them.
Importing this package changes nothing and imports nothing heavy; names are loaded when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avlprof._lazy import exports
from avlprof.versions import __version__ as __version__

if TYPE_CHECKING:
    from avlprof.analysis.lens import Lens
    from avlprof.api.lens import LensSettings, lens
    from avlprof.api.trace import trace
    from avlprof.api.tune import certified, smallest, sweep, tune
    from avlprof.errors import UserError
    from avlprof.evaluation.compare import Comparison, ComparisonSettings, compare
    from avlprof.evaluation.damage import Knockout
    from avlprof.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
    from avlprof.evaluation.knockout import KnockoutSettings, knockout
    from avlprof.models import ModelSpec, load_model
    from avlprof.policy import Policy, find_policy, load_policy, save_policy
    from avlprof.run import Run, latest_run, picture_task
    from avlprof.runtime import AVLCache
    from avlprof.runtime.apply import apply, wrap
    from avlprof.tasks import load_task
    from avlprof.tracing import TraceSettings, record
    from avlprof.tuning import Settings, Space, Study, Tuned
    from avlprof.watch import Watch

_HOMES = {
    "Run": "avlprof.run",
    "latest_run": "avlprof.run",
    "picture_task": "avlprof.run",
    "ModelSpec": "avlprof.models",
    "TraceSettings": "avlprof.tracing",
    "UserError": "avlprof.errors",
    "Watch": "avlprof.watch",
    "Lens": "avlprof.analysis.lens",
    "LensSettings": "avlprof.api.lens",
    "lens": "avlprof.api.lens",
    "trace": "avlprof.api.trace",
    "certified": "avlprof.api.tune",
    "smallest": "avlprof.api.tune",
    "sweep": "avlprof.api.tune",
    "tune": "avlprof.api.tune",
    "Settings": "avlprof.tuning",
    "Space": "avlprof.tuning",
    "Study": "avlprof.tuning",
    "Tuned": "avlprof.tuning",
    "record": "avlprof.tracing",
    "Comparison": "avlprof.evaluation.compare",
    "ComparisonSettings": "avlprof.evaluation.compare",
    "compare": "avlprof.evaluation.compare",
    "Evaluation": "avlprof.evaluation.evaluate",
    "EvaluationSettings": "avlprof.evaluation.evaluate",
    "evaluate": "avlprof.evaluation.evaluate",
    "Knockout": "avlprof.evaluation.damage",
    "KnockoutSettings": "avlprof.evaluation.knockout",
    "knockout": "avlprof.evaluation.knockout",
    "load_model": "avlprof.models",
    "load_task": "avlprof.tasks",
    "AVLCache": "avlprof.runtime",
    "apply": "avlprof.runtime.apply",
    "wrap": "avlprof.runtime.apply",
    "Policy": "avlprof.policy",
    "find_policy": "avlprof.policy",
    "load_policy": "avlprof.policy",
    "save_policy": "avlprof.policy",
}

__all__ = [
    "AVLCache",
    "Comparison",
    "ComparisonSettings",
    "Evaluation",
    "EvaluationSettings",
    "Knockout",
    "KnockoutSettings",
    "Lens",
    "LensSettings",
    "ModelSpec",
    "Policy",
    "Run",
    "Settings",
    "Space",
    "Study",
    "TraceSettings",
    "Tuned",
    "UserError",
    "Watch",
    "apply",
    "certified",
    "compare",
    "evaluate",
    "find_policy",
    "knockout",
    "latest_run",
    "lens",
    "load_model",
    "load_policy",
    "load_task",
    "picture_task",
    "record",
    "save_policy",
    "smallest",
    "sweep",
    "trace",
    "tune",
    "wrap",
]


__getattr__, __dir__ = exports(__name__, _HOMES)
