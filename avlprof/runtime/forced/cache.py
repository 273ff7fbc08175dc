"""A cache that holds nothing and pretends to hold a prompt."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache

from avlprof.runtime.dense import BufferedLayer


class PassThrough(BufferedLayer):
    """A layer that stores nothing: it reports a prompt of `seen` tokens and hands through."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The pass's own keys and values, unchanged."""
        return key_states, value_states


class ForcedCache(Cache):
    """A cache that pretends to hold a prompt of `length` tokens in each of `layers` layers."""

    def __init__(self, layers: int, length: int) -> None:
        super().__init__(layers=[PassThrough(length) for _ in range(layers)])
