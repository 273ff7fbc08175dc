"""Buffers and captured steps that outlive a call: kept by what they depend on, and used again.

What a captured step reads has to lie where it lay. So buffers belong to the context and not to a cache,
and their lengths are rounded up to buckets, so that the next prompt, of the same length or of one near
it, is laid out in the buffers of the last one and replays its steps. A cache that somebody still holds
keeps its own: another prompt gets other buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from avlprof.attention.call import AttentionCall
from avlprof.attention.column_sums import kernels_run
from avlprof.runtime.eviction import CoreSlots
from avlprof.runtime.graph import Replay
from avlprof.runtime.layout import RowPlan
from avlprof.runtime.packed import StoredBits
from avlprof.runtime.text_part import TextPart
from avlprof.runtime.windows import Extents, HeldSlots, rounded

if TYPE_CHECKING:
    from avlprof.runtime.cache import AVLCache
    from avlprof.runtime.layer import AdaptiveLayer

KEPT_BYTES = 4 << 30  # of buffers that no cache uses
_MOST = 8  # buckets that no cache uses
_KINDS = 16  # of captured steps in a bucket
Buffers = tuple[Tensor, Tensor, Tensor]


class FixedBuffers:
    """Where one layer's keys, values, positions, masks and core lie while its steps are captured.

    `slots [B, 1, 1]` are those that the rows' tokens go to, and `position [1]` the token's logical
    position: whoever replays steps fills them. Storage is made when the first content comes.
    """

    def __init__(self, extents: Extents, slots: Tensor, position: Tensor) -> None:
        self.extents, self.held, self.position = extents, HeldSlots(slots), position
        self._tensors: Buffers | None = None
        self._core: CoreSlots | None = None
        self._stored: dict[str, StoredBits] = {}

    def tensors_for(self, key: Tensor, value: Tensor, groups: int) -> Buffers:
        """Keys and values `[B, Hkv, C, D]` like these, and positions `[B, groups, C]`."""
        if self._tensors is None:
            rows, capacity = len(key), self.extents.left + self.extents.text
            with torch.inference_mode(False):  # else nothing could be written there outside of that mode
                keys, values = (
                    torch.zeros(
                        (*states.shape[:2], capacity, states.shape[3]), dtype=states.dtype, device=key.device
                    )
                    for states in (key, value)
                )
                positions = torch.full((rows, groups, capacity), -1, device=key.device)
                for whole, masked in zip((False, True), self.extents.masked, strict=True):
                    if masked:
                        self._hold(whole, rows, key)
            self._tensors = keys, values, positions
        return self._tensors

    def _hold(self, whole: bool, rows: int, key: Tensor) -> None:
        """Make the mask of a kind of step, and where kernels run its bounds."""
        shape = rows, 1, 1, self.extents.left + self.extents.text
        self.held.masks[whole] = torch.zeros(shape, dtype=torch.bool, device=key.device)
        if kernels_run(key):
            self.held.firsts[whole] = torch.zeros(rows, dtype=torch.long, device=key.device)
            if self.held.lasts is None:
                self.held.lasts = torch.zeros(rows, dtype=torch.long, device=key.device)

    def take_over(self, old: Buffers, left: int, end: int) -> Buffers:
        """The first `end` slots of a layer's buffers, whose text part begins at slot `left`, moved here."""
        shift = self.extents.left - left
        new = self.tensors_for(old[0], old[1], old[2].shape[1])
        for source, target, nothing in zip(old, new, (0, 0, -1), strict=True):
            content = source[:, :, max(0, -shift) : end]
            target.fill_(nothing)
            target[:, :, max(0, shift) :][:, :, : content.shape[2]] = content
        return new

    def core_like(self, core: CoreSlots) -> CoreSlots:
        """`core`, where captured steps look for it."""
        if self._core is None:
            with torch.inference_mode(False):
                self._core = core.copied()
        else:
            self._core.refill(core)
        return self._core

    def stored_like(self, name: str, stored: StoredBits) -> StoredBits:
        """`stored`, where captured steps look for what is known as `name` among the extents."""
        width, even = getattr(self.extents, name)
        stored = stored.fitted(width, not even)
        if name in self._stored:
            self._stored[name] = self._stored[name].refilled(stored)
        else:
            with torch.inference_mode(False):
                self._stored[name] = stored.copied()
        return self._stored[name]

    def holds(self, keys: Tensor | None) -> bool:
        """Whether these keys lie here."""
        return self._tensors is not None and keys is self._tensors[0]

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and positions, and of what few bits store."""
        stored = sum(part.allocated_bytes() for part in self._stored.values())
        return stored + sum(tensor.untyped_storage().nbytes() for tensor in self._tensors or ())


@dataclass(frozen=True)
class CapturedStep:
    """A step to replay: its logits, then the queries of `calls`, which views of fixed buffers complete.

    `output` is the class of what the model returned. `calls` are those of the layers, if anybody listened.
    """

    replay: Replay
    output: type
    calls: list[AttentionCall]

    def heard(self, queries: Sequence[Tensor]) -> list[AttentionCall]:
        """The layers' attention calls in the step that has just been replayed."""
        return [call._replace(query=query) for call, query in zip(self.calls, queries, strict=True)]


class Bucket:
    """The fixed buffers of all layers, what their steps read beside them, and the steps captured so far."""

    def __init__(self, extents: list[Extents], rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.slots = torch.zeros(len(extents), rows, 1, 1, dtype=torch.long, device=device)
            self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = [
            FixedBuffers(one, own, self.position) for one, own in zip(extents, self.slots, strict=True)
        ]
        self.inputs: dict[Any, Tensor] = {}
        self.steps: dict[Any, CapturedStep] = {}
        self.owner: ref[AVLCache] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a cache has no bucket: these steps would write into the original's buffers."""

    @property
    def idle(self) -> bool:
        """Whether no cache uses it."""
        return self.owner is None or self.owner() is None

    def holds(self, layers: Sequence[AdaptiveLayer]) -> bool:
        """Whether content of these layers lies in it."""
        return any(own.holds(layer.keys) for own, layer in zip(self.layers, layers, strict=True))

    @property
    def bytes(self) -> int:
        """Bytes of the buffers of all layers."""
        return sum(layer.bytes for layer in self.layers)

    def tell(self, slots: list[list[int]], position: int) -> None:
        """Where each layer puts the rows' tokens, `slots [L][B]`, and at which logical position."""
        numbers = torch.tensor(slots)[..., None, None]
        on_device = self.slots.device.type == "cuda"
        self.slots.copy_(numbers.pin_memory() if on_device else numbers, non_blocking=True)
        self.position.fill_(position)

    def keep(self, kind: Any, step: CapturedStep) -> None:
        """Keep a captured step; when there are many kinds, instead of all others."""
        if len(self.steps) >= _KINDS:
            self.steps.clear()
        self.steps[kind] = step

    def fixed(self, name: str, value: Tensor) -> Tensor:
        """An input of a step, where captured steps look for it."""
        key = name, value.shape, value.dtype
        if key in self.inputs:
            return self.inputs[key].copy_(value)
        with torch.inference_mode(False):
            self.inputs[key] = value.clone()
        return self.inputs[key]


class Buckets:
    """The buckets of one context: who has which, and which are kept for later.

    Of those that no cache uses the latest used ones stay, `KEPT_BYTES` of buffers at most. Not for
    several threads at once.
    """

    def __init__(self, model: nn.Module, ahead: int, most_bytes: int = KEPT_BYTES) -> None:
        """`ahead` steps at least fit into a bucket that a cache is given."""
        self.captures = 0
        self.ahead = ahead
        self._model, self._most_bytes = model, most_bytes
        self._known: dict[Any, list[Bucket]] = {}
        self._recent: list[Bucket] = []
        self._weights: list[int] = []

    @property
    def bytes(self) -> int:
        """Bytes of the buffers of all buckets, those in use included."""
        return sum(bucket.bytes for bucket in self._recent)

    def reserve(self, cache: AVLCache, call: AttentionCall) -> None:
        """Have the prompt that a cache begins laid out in a bucket; `call` is its first layer's."""
        weights = [parameter.data_ptr() for parameter in self._model.parameters()]
        if weights != self._weights:  # captured steps read those that were there
            self.release()
            self._weights = weights
        layers: list[AdaptiveLayer] = cache.layers
        if cache.bucket is not None:
            cache.bucket.owner = cache.bucket = None
        texts = [shape.text for shape in cache.turn]
        extents = [
            prompt_extents(layer, cache.row_plans(index), texts, cache.length, self.ahead)
            for index, layer in enumerate(layers)
        ]
        bucket = self._given(cache, extents, call.key)
        for layer, own in zip(layers, bucket.layers, strict=True):
            layer.fixed = own

    def settle(self, cache: AVLCache) -> Bucket:
        """The bucket of a cache whose step has been counted; its layers move into one that fits."""
        layers: list[AdaptiveLayer] = cache.layers
        bucket: Bucket | None = cache.bucket
        if bucket is not None and all(layer.fits for layer in layers):
            return bucket
        if bucket is not None and not bucket.holds(layers):  # as behind a turn
            bucket.owner = None
        bucket = self._given(
            cache, [step_extents(layer, self.ahead) for layer in layers], layers[0].buffers[0]
        )
        for layer, own in zip(layers, bucket.layers, strict=True):
            layer.move(own)
        return bucket

    def release(self) -> None:
        """Let go of all captured steps, and of the buffers that no cache uses."""
        for bucket in self._recent:
            bucket.steps.clear()
            bucket.inputs.clear()
        self.forget()

    def forget(self) -> None:
        """Let go of what no cache uses."""
        self._known.clear()
        self._recent.clear()

    def _given(self, cache: AVLCache, extents: list[Extents], states: Tensor) -> Bucket:
        """An idle bucket of these extents, or a new one, which from now on is the cache's."""
        key = tuple(extents), len(cache.rows), states.dtype, states.device
        own = self._known.setdefault(key, [])
        bucket = next((one for one in reversed(own) if one.idle), None)
        if cache.bucket is not None:
            cache.bucket.owner = None
        if bucket is None:
            bucket = Bucket(extents, len(cache.rows), states.device)
            own.append(bucket)
        else:
            self._recent.remove(bucket)
        self._recent.append(bucket)
        bucket.owner, cache.bucket = ref(cache), bucket
        self._trim()
        return bucket

    def _trim(self) -> None:
        """Let go of idle buckets beyond what is kept, the longest unused first."""
        idle = [bucket for bucket in self._recent if bucket.idle]
        while idle and (len(idle) > _MOST or sum(bucket.bytes for bucket in idle) > self._most_bytes):
            gone = idle.pop(0)
            self._recent.remove(gone)
            for own in self._known.values():
                if gone in own:
                    own.remove(gone)
        self._known = {key: own for key, own in self._known.items() if own}


def prompt_extents(
    layer: AdaptiveLayer, plans: list[RowPlan], texts: Sequence[int], length: int, ahead: int
) -> Extents:
    """How long a layer's fixed buffers have to be for a first prompt of `length`, `texts` of it text."""
    part = TextPart(layer.rule)
    counts = part.extend(list(texts), [plan.text for plan in plans])
    return _extents(layer, plans, part, counts, length, ahead)


def step_extents(layer: AdaptiveLayer, ahead: int) -> Extents:
    """The same for what it holds, and `ahead` tokens more."""
    return _extents(layer, layer.plans, layer.text, layer.text.counts, layer.seen, ahead)


def _extents(
    layer: AdaptiveLayer, plans: list[RowPlan], part: TextPart, counts: list[int], seen: int, ahead: int
) -> Extents:
    most = [rounded(count + ahead) for count in counts]
    if not layer.rule.grows:  # a pool's limit is as long as its prompt, a window's is the policy's
        limits = [limit for limit, _ in part.rooms()]
        if layer.rule.policy.joint is not None:
            limits = [rounded(limit) for limit in limits]
        most = [min(a, limit) for a, limit in zip(most, limits, strict=True)]
    weighs, told = layer.picks(plans) or layer.leads, seen if layer.leads else 0
    return Extents.of(plans, counts, most, weighs, layer.packs, told)
