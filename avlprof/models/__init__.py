"""From a name to a loaded model, its decoder and its vision positions.

The exported names that need torch are imported when first asked for, so that the table of
aliases can be listed without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from avlprof.models.aliases import ALIASES, Alias

if TYPE_CHECKING:
    from avlprof.models.adapter import Adapter
    from avlprof.models.families import adapter_for
    from avlprof.models.load import LoadedModel, load_model

__all__ = ["ALIASES", "Adapter", "Alias", "LoadedModel", "adapter_for", "load_model"]

_HOMES = {"Adapter": "adapter", "adapter_for": "families", "LoadedModel": "load", "load_model": "load"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
