"""A layer's buffers of slots: keys, values, and the logical position that each slot holds."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from avlprof.runtime.dense import BufferedLayer, grown, more_room
from avlprof.runtime.layout import take
from avlprof.runtime.window import Slot


class SlotLayer(BufferedLayer):
    """Buffers whose slots are in an order of their own.

    `keys` and `values` are `[B, Hkv, capacity, D]`, `positions [B, G, capacity]`, with `G` 1 or
    `Hkv`; -1 where nothing was ever written.
    """

    positions: Tensor | None = None

    def fill(self, key: Tensor, value: Tensor, places: Tensor, order: Tensor, room: int) -> None:
        """New buffers of the tokens `order [B, G, n]` of `key` and `value`, and `room` more slots.

        `places [B, G, N]` are the logical positions of all tokens.
        """
        self.keys, self.values = (_buffer(states, order, room) for states in (key, value))
        self.positions = pad(places.gather(-1, order), (0, room), value=-1)

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of a layer that holds something."""
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        return self.keys, self.values, self.positions

    def grow_for(self, slot: int, exactly: bool = False) -> int:
        """Make room for slot `slot`, and unless `exactly` for more; how many slots this added."""
        keys, values, positions = self.buffers
        capacity = keys.shape[2]
        if slot < capacity:
            return 0
        more = slot + 1 - capacity if exactly else more_room(capacity)
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
        places = slot.expand(-1, positions.shape[1], -1)
        if isinstance(position, int):
            positions.scatter_(2, places, position)
        else:
            positions.scatter_(2, places, position.expand(places.shape))

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
