"""From a name to a loaded model, its decoder and its vision positions.

Names that need torch are imported when first asked for, so that the table of aliases can be
listed without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avlprof._lazy import exports

if TYPE_CHECKING:
    from avlprof.models.adapter import Adapter
    from avlprof.models.aliases import ALIASES, Alias
    from avlprof.models.families import adapter_for
    from avlprof.models.load import LoadedModel, load_model
    from avlprof.models.spec import ModelSpec

__all__ = ["ALIASES", "Adapter", "Alias", "LoadedModel", "ModelSpec", "adapter_for", "load_model"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "ALIASES": "avlprof.models.aliases",
        "Adapter": "avlprof.models.adapter",
        "Alias": "avlprof.models.aliases",
        "LoadedModel": "avlprof.models.load",
        "ModelSpec": "avlprof.models.spec",
        "adapter_for": "avlprof.models.families",
        "load_model": "avlprof.models.load",
    },
)
