"""Trace, tune and run adaptive attention policies for large vision-language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avlprof.api import trace
    from avlprof.policy import Policy, find_policy, load_policy, save_policy
    from avlprof.runtime import AVLCache, apply
    from avlprof.traced import Run, latest_run

__version__ = "0.1.0"

_LAZY = {
    "Run": "avlprof.traced",
    "latest_run": "avlprof.traced",
    "trace": "avlprof.api",
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
    "apply",
    "find_policy",
    "latest_run",
    "load_policy",
    "save_policy",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'avlprof' has no attribute '{name}'")
