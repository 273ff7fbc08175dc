"""What a model calls the argument and the output that hold its cache: transformers renamed them in 5.24."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def cache_argument(model: nn.Module) -> str:
    """The name of the cache among the arguments of a model's forward call."""
    new, old = NAMES
    return new if new in inspect.signature(model.forward).parameters else old


def given_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword arguments that hand a cache to a model: `model(**inputs, **given_cache(model, cache))`."""
    return {cache_argument(model): cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return next((output[name] for name in NAMES if name in output), None)
