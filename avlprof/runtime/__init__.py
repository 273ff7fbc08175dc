"""Policy and model to generation: cache, layout, eviction, refresh, forced scoring.

The exported names are imported when first asked for, so that `runtime.support` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avlprof.runtime.cache import AVLCache, LayerUse
    from avlprof.runtime.context import Runtime, apply

__all__ = ["AVLCache", "LayerUse", "Runtime", "apply"]

_HOMES = {"AVLCache": "cache", "LayerUse": "cache", "Runtime": "context", "apply": "context"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
