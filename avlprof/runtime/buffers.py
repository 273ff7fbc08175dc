"""Buffers of keys and values: layers that keep everything, and layers of slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from avlprof.attention.call import AttentionCall
from avlprof.attention.column_sums import kernels_run
from avlprof.errors import UserError
from avlprof.policy import FULL, PromptShape
from avlprof.runtime.layout import RowPlan, take, take_into
from avlprof.runtime.step import LayerUse, Step
from avlprof.runtime.windows import Slot

if TYPE_CHECKING:
    from avlprof.runtime.turns import TurnPrefill

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

    `keys` and `values` are `[B, Hkv, capacity, D]`; `seen` counts logical positions. What a runtime
    asks of a layer is answered here as by one that keeps everything.
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

    def turn_for(self, call: AttentionCall, modality: Tensor, positions: Tensor) -> TurnPrefill | None:
        """The prompt or further turn that `update` was handed; None: nothing competes, attend as stock does.

        `modality [B, q]` and the logical `positions [B, 1, q]` are those of the new tokens.
        """
        return None

    def compact(
        self,
        turn: TurnPrefill,
        call: AttentionCall,
        positions: Tensor,
        plans: list[RowPlan],
        span: tuple[int, int],
    ) -> None:
        """Let the tokens of a turn compete, and free those that go; here all stay."""

    def step_for(
        self, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None = None
    ) -> Step | None:
        """The decoding step that `update` began, of `query [B, H, 1, D]`; None: attend as stock does."""
        return None

    def after(self, step: Step, weights: Tensor) -> None:
        """What a step's `weights [B, G, n]` change, once all observers have seen it; here nothing."""

    def prompt_bytes(self, rows: Sequence[PromptShape]) -> list[int]:
        """Bytes of each row's prompt tokens in memory, of prompts `rows`, as `LayerUse` counts them."""
        return [shape.total * self.bytes_per_token() for shape in rows]

    def use(self, layer: int, rows: Sequence[PromptShape], length: int) -> LayerUse:
        """Measured use of this layer, number `layer`.

        Args:
            rows: token counts of the prompts, all turns together.
            length: padded tokens of the prompts.
        """
        size, prompt = self.bytes_per_token(), sum(shape.total for shape in rows)
        steps = self.seen - length
        return LayerUse(
            layer=layer,
            prompt=prompt * size,
            live=(prompt + steps * len(rows)) * size,
            allocated=self.allocated_bytes(),
            dense_prompt=prompt * size,
            read=float(prompt * size),
            refreshes=0,
            steps=steps,
        )

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind keys and values."""
        tensors = [t for t in (self.keys, self.values) if t is not None]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value over all KV heads of this layer, in 16 bits a number."""
        parts = [part for part in (self.keys, self.values) if part is not None]
        return sum(part.shape[1] * part.shape[3] for part in parts) * FULL // 8


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


class SlotLayer(BufferedLayer):
    """Buffers whose slots are in an order of their own.

    `keys` and `values` are `[B, Hkv, capacity, D]`, `positions [B, G, capacity]`, with `G` 1 or
    `Hkv`; -1 where nothing was ever written.
    """

    positions: Tensor | None = None

    def fill(
        self,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        order: Tensor,
        room: int,
        into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """New buffers of the tokens `order [B, G, n]` of `key` and `value`, and `room` more slots.

        `positions [B, G, N]` are the logical positions of all tokens. `into` are buffers to use in place
        of new ones, with slots enough.
        """
        # here eviction frees memory: nothing else refers to the buffers that these replace, nor, once
        # the layer's forward is over, to `key` and `value`
        if kernels_run(key):
            from avlprof.runtime.triton_layout import taken_slots

            self.keys, self.values, self.positions = taken_slots(key, value, positions, order, room, into)
            return
        if into is not None:
            with torch.no_grad():
                for states, buffer in zip((key, value), into, strict=False):
                    take_into(states, order, buffer)
                into[2].copy_(pad(positions.gather(-1, order), (0, room), value=-1))
            self.keys, self.values, self.positions = into
            return
        self.keys, self.values = (_buffer(states, order, room) for states in (key, value))
        self.positions = pad(positions.gather(-1, order), (0, room), value=-1)

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of a layer that holds something."""
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        return self.keys, self.values, self.positions

    def grow_for(self, slot: int) -> int:
        """Make room for slot `slot` and more; how many slots this added."""
        keys, values, positions = self.buffers
        capacity = keys.shape[2]
        if slot < capacity:
            return 0
        more = more_room(capacity)
        self.keys, self.values = grown(keys, capacity + more), grown(values, capacity + more)
        self.positions = pad(positions, (0, more), value=-1)
        return more

    def write(self, slot: Slot, key: Tensor, value: Tensor, position: int | Tensor) -> None:
        """Write one token a row, `[B, Hkv, 1, D]` at a logical position, into its slot."""
        keys, values, positions = self.buffers
        if isinstance(slot, int):
            keys.narrow(2, slot, 1).copy_(key)
            values.narrow(2, slot, 1).copy_(value)
            positions.narrow(2, slot, 1).fill_(position)
            return
        keys.scatter_(2, slot[..., None].expand(key.shape), key)
        values.scatter_(2, slot[..., None].expand(value.shape), value)
        slots = slot.expand(-1, positions.shape[1], -1)
        if isinstance(position, int):
            positions.scatter_(2, slots, position)
        else:
            positions.scatter_(2, slots, position.expand(slots.shape))

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    def reset(self) -> None:
        super().reset()
        self.positions = None

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind keys, values and the slots' positions."""
        index = self.positions.untyped_storage().nbytes() if self.positions is not None else 0
        return super().allocated_bytes() + index


def _buffer(states: Tensor, order: Tensor, room: int) -> Tensor:
    kept = order.shape[-1]
    buffer = states.new_zeros((*states.shape[:2], kept + room, states.shape[3]))
    buffer[:, :, :kept] = take(states, order)
    return buffer
