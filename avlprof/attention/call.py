"""One layer's attention as it is handed over, and who may listen or take over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from avlprof.errors import UserError

Kernel = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionCall(NamedTuple):
    """What a layer's attention was handed.

    `query [B, H, q, D]`, `key` and `value [B, Hkv, n, D]` are post-RoPE; `mask` is bool
    `[B, 1, q, kv]` or None; `positions [B, 1 or Hkv, n]` are the logical positions of the key
    columns, or None when column and position are the same. `after` is what the runtime does once
    the observers have seen the call: until then nothing moves in the buffers that it views.
    `appended`: the cache makes a new tensor of the old keys and the new ones at each step and leaves
    the old ones as they are. `decoded` gives the call with the keys that it attended to and that are stored
    packed; observers are shown that one.
    """

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    kernel: Kernel
    options: dict[str, Any]
    positions: Tensor | None = None
    valid: Tensor | None = None
    after: Callable[[], None] | None = None
    appended: bool = False
    decoded: Callable[[Any], Any] | None = None

    @property
    def sinks(self) -> Tensor | None:
        """A learned logit `[H]` a query head that takes part in its softmax and has no value; None: none.

        Source: GPT-OSS.
        """
        return self.options.get("s_aux")

    def stock(self) -> Tensor:
        """Output `[B, q, H, D]` of the implementation that the model had before the switch."""
        mask = self.mask
        return self.kernel(
            self.module, self.query, self.key, self.value, mask, scaling=self.scaling, **self.options
        )[0]


class Bounds(NamedTuple):
    """The slots that each row sees: from its `firsts` to its `lasts`, int64 `[B]` on the device.

    Slots are counted from the buffer's first; the view that is attended to begins at slot `start`.
    """

    firsts: Tensor
    lasts: Tensor
    start: int


class StepStates(NamedTuple):
    """What a decoding step attends with.

    `query [B, H, 1, D]`, and views `key [B, Hkv, N, D]` and `value [B, Hkv, N, E]` of a layer's slots
    (without values a step only weighs), post-RoPE. `sinks [H]` are learned logits. `mask` is bool
    `[B, 1 or Hkv, 1, N]`, True where a row may look, None where all see all; `bounds` say the same
    to kernels where what a row sees is one interval, and are None else.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    bounds: Bounds | None = None


@dataclass
class Forward:
    """One forward pass of the switched model.

    `modality [B, n]` covers every position seen so far, this pass included; the last `new`
    are this pass's. `step` is 0 in prefill and counts decoding passes from 1. `conversation` stands
    for the cache: it is the same object in all passes over one. `begun` is for a runtime to note
    that a layer has attended. `moved`: the cache's keys are not those that the pass before left
    (rows were chosen, as beams are, or tokens cut off).
    """

    modality: Tensor
    new: int
    step: int
    conversation: object = None
    begun: bool = False
    moved: bool = False


class AtWork:
    """What is at work on a model for the length of a context, and belongs into no file."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            "a model that is wrapped, or inside avlprof.apply or avlprof.record, cannot be pickled, as "
            "torch.save and processes of one's own do; save_pretrained writes it; or leave the context first"
        )


class Observer(Protocol):
    """Listens to the attention of a switched model."""

    def begin(self, forward: Forward) -> None:
        """Called before each forward pass."""

    def attended(self, forward: Forward, call: AttentionCall) -> None:
        """Called after each layer's attention, with the keys that it attended to."""


class AttentionRuntime(Protocol):
    """Takes over the cache and the attention of a switched model."""

    def new_cache(self) -> Any:
        """A fresh cache for a new sequence."""

    def owns(self, cache: Any) -> bool:
        """Whether a cache was made by this runtime."""

    def governs(self, cache: Any, layer: int) -> bool:
        """Whether this runtime, and not the model, decides what a layer attends to."""

    def attend(self, forward: Forward, cache: Any, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """The layer's output `[B, q, H, D]`, and the call as the observers should see it."""
