"""Policy and model to generation: cache, layout, eviction, refresh, forced scoring."""

from avlprof.runtime.apply import Runtime, apply
from avlprof.runtime.cache import AVLCache, LayerUse

__all__ = ["AVLCache", "LayerUse", "Runtime", "apply"]
