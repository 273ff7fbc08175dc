"""Policy and model to generation: cache, layout, eviction, refresh, forced scoring.

Names are imported when first asked for, so that `runtime.support` needs no torch. The verb is
`avlprof.runtime.apply.apply`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avlprof._lazy import exports

if TYPE_CHECKING:
    from avlprof.runtime.apply import Runtime
    from avlprof.runtime.cache import AVLCache
    from avlprof.runtime.step import LayerUse

__all__ = ["AVLCache", "LayerUse", "Runtime"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "AVLCache": "avlprof.runtime.cache",
        "LayerUse": "avlprof.runtime.step",
        "Runtime": "avlprof.runtime.apply",
    },
)
