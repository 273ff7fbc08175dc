"""Search for the best policy at a budget, and prove it.

Names are loaded when used: who lists studies, or shows one, needs no model and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avlprof.tuning.bisection import Smallest, smallest
    from avlprof.tuning.candidate import Budget, Candidate
    from avlprof.tuning.export import export_policy
    from avlprof.tuning.front import Sweep, sweep
    from avlprof.tuning.settings import Settings
    from avlprof.tuning.space import Space
    from avlprof.tuning.storage import StudyMeta, read_meta, read_study
    from avlprof.tuning.study import Tuned, tune

_LAZY = {
    "Budget": "candidate",
    "Candidate": "candidate",
    "export_policy": "export",
    "Settings": "settings",
    "Smallest": "bisection",
    "smallest": "bisection",
    "Space": "space",
    "StudyMeta": "storage",
    "read_meta": "storage",
    "read_study": "storage",
    "Sweep": "front",
    "sweep": "front",
    "Tuned": "study",
    "tune": "study",
}

__all__ = [
    "Budget",
    "Candidate",
    "Settings",
    "Smallest",
    "Space",
    "StudyMeta",
    "Sweep",
    "Tuned",
    "export_policy",
    "read_meta",
    "read_study",
    "smallest",
    "sweep",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"avlprof.tuning.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'avlprof.tuning' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
