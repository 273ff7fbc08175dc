"""A cache layer that keeps everything, in a buffer allocated ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from avlprof.errors import UserError

RESERVE = 32  # tokens allocated beyond what is stored


def more_room(capacity: int) -> int:
    """Slots that a full buffer of `capacity` grows by: an eighth, for rare copies and little spare room."""
    return max(RESERVE, capacity // 8)


def grown(buffer: Tensor, capacity: int) -> Tensor:
    """A copy of `buffer [B, H, C, D]` with room for `capacity` tokens."""
    larger = buffer.new_zeros((*buffer.shape[:2], capacity, *buffer.shape[3:]))
    larger[:, :, : buffer.shape[2]] = buffer
    return larger


class BufferedLayer(CacheLayerMixin):
    """What the dense and the adaptive layer share: buffers, logical length, row operations.

    `keys` and `values` are `[B, Hkv, capacity, D]`; `seen` counts logical positions.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included, so that positions and masks stay right."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError(
            "a policy's cache cannot be cropped; assisted and prompt-lookup decoding are not supported"
        )

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows`, in that order and with repeats."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind keys and values."""
        tensors = [t for t in (self.keys, self.values) if t is not None]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value over all KV heads of this layer."""
        if self.keys is None or self.values is None:
            return 0
        return (self.keys.shape[1] * self.keys.shape[3] + self.values.shape[1] * self.values.shape[3]) * (
            self.keys.element_size()
        )


class DenseLayer(BufferedLayer):
    """The stock cache's content in a preallocated buffer: an append copies one token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, q, D]`; returns views of everything stored."""
        new = key_states.shape[2]
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            room = (*key_states.shape[:2], new + RESERVE)
            self.keys = key_states.new_empty((*room, key_states.shape[3]))
            self.values = value_states.new_empty((*room, value_states.shape[3]))
        elif self.seen + new > self.keys.shape[2]:
            capacity = self.seen + new + more_room(self.seen)
            self.keys, self.values = grown(self.keys, capacity), grown(self.values, capacity)
        self.keys.narrow(2, self.seen, new).copy_(key_states)
        self.values.narrow(2, self.seen, new).copy_(value_states)
        self.seen += new
        return self.keys.narrow(2, 0, self.seen), self.values.narrow(2, 0, self.seen)
