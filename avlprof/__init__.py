"""Trace, tune and run adaptive attention policies for large vision-language models.

`trace` records where a model looks and gives a `Run`, `Run.profile()` sums it up layer by layer,
its `derive()` and `tune` make a `Policy`, `apply` runs a model under one, `evaluate` compares
policies, and `record` measures a `generate()` of your own. `docs/python.md` shows each of them.
Importing this package changes nothing and imports nothing heavy; names are loaded when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from avlprof.versions import __version__ as __version__

if TYPE_CHECKING:
    from avlprof.api import trace
    from avlprof.evaluation import evaluate
    from avlprof.models import load_model
    from avlprof.policy import Policy, find_policy, load_policy, save_policy
    from avlprof.runtime import AVLCache, apply
    from avlprof.search import smallest, sweep, tune
    from avlprof.tasks import load_task
    from avlprof.traced import Run, latest_run
    from avlprof.tracing import record
    from avlprof.tuning import Tuned

_LAZY = {
    "Run": "avlprof.traced",
    "latest_run": "avlprof.traced",
    "trace": "avlprof.api",
    "smallest": "avlprof.search",
    "sweep": "avlprof.search",
    "tune": "avlprof.search",
    "Tuned": "avlprof.tuning",
    "record": "avlprof.tracing",
    "evaluate": "avlprof.evaluation",
    "load_model": "avlprof.models",
    "load_task": "avlprof.tasks",
    "AVLCache": "avlprof.runtime",
    "apply": "avlprof.runtime",
    "Policy": "avlprof.policy",
    "find_policy": "avlprof.policy",
    "load_policy": "avlprof.policy",
    "save_policy": "avlprof.policy",
}

__all__ = [
    "AVLCache",
    "Policy",
    "Run",
    "Tuned",
    "apply",
    "evaluate",
    "find_policy",
    "latest_run",
    "load_model",
    "load_policy",
    "load_task",
    "record",
    "save_policy",
    "smallest",
    "sweep",
    "trace",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'avlprof' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
