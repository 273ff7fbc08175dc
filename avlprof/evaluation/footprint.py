"""Bytes of a prompt's KV cache, read off a cache that has just been filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avlprof.policy import FULL, PromptShape, counted_layers
from avlprof.runtime.buffers import BufferedLayer


@dataclass(frozen=True)
class Footprint:
    """KV bytes of one row of a batch, over all layers that a policy acts on and their KV heads.

    `live` is what is kept of the prompt, `dense` what the stock cache holds of it without padding, both
    in 16 bits a number whatever the model runs in, or as few as are stored. `allocated` is the row's
    equal part of the storage behind the cache: padding to the batch's longest row and the reserve for
    generated tokens included.
    """

    live: int
    dense: int
    allocated: int


def footprints(cache: Any, rows: Sequence[PromptShape]) -> list[Footprint]:
    """The footprint of each row of `cache`, which holds nothing but the prompts `rows`.

    `cache` is the runtime's or a stock `DynamicCache`. Layers that no policy acts on (`governed` of
    the rows), and those with a sliding window, are left out: what they hold does not depend on it.
    """
    live, dense, allocated = [0] * len(rows), [0] * len(rows), 0
    for layer in (cache.layers[index] for index in counted_layers(rows, len(cache.layers))):
        if layer.is_sliding:
            continue
        size = _bytes_per_token(layer.keys) + _bytes_per_token(layer.values)
        whole = [size * shape.total for shape in rows]
        kept = layer.prompt_bytes(rows) if isinstance(layer, BufferedLayer) else whole
        live = [before + own for before, own in zip(live, kept, strict=True)]
        dense = [before + own for before, own in zip(dense, whole, strict=True)]
        allocated += storage_bytes(layer)
    return [Footprint(a, b, allocated // len(rows)) for a, b in zip(live, dense, strict=True)]


def cache_bytes(cache: Any) -> int:
    """Bytes of the storage behind all layers of a cache, windows and states included."""
    return sum(storage_bytes(layer) for layer in cache.layers)


def storage_bytes(layer: Any) -> int:
    """Bytes of the storage behind one layer, the bookkeeping of slots included; 0 before its first token."""
    if isinstance(layer, BufferedLayer):
        return layer.allocated_bytes()
    held = [getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states")]
    parts = [part for one in held for part in (one.values() if isinstance(one, dict) else [one])]
    return sum(part.untyped_storage().nbytes() for part in parts if isinstance(part, Tensor))


def _bytes_per_token(states: Tensor) -> int:
    return states.shape[1] * states.shape[3] * FULL // 8
