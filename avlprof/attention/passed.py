"""What has passed over a cache: the modality of its positions, and the keys that each pass left."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, QuantizedCache

from avlprof.attention.modality import Modality
from avlprof.errors import UserError

_AHEAD = 64  # positions of generated tokens that are marked ahead


class Passed:
    """The modality of every position that a cache has seen, and its decoding passes."""

    def __init__(self, modality: Tensor) -> None:
        self._marked, self.length, self.steps = modality, modality.shape[1], 0

    @property
    def modality(self) -> Tensor:
        """`[B, n]`."""
        return self._marked.narrow(1, 0, self.length)

    def step(self) -> None:
        """One more generated token a row."""
        self.steps += 1
        self.length += 1
        if self.length > self._marked.shape[1]:
            self._marked = pad(self._marked, (0, _AHEAD), value=int(Modality.GENERATED))

    def turn(self, modality: Tensor) -> None:
        """A turn with tokens `[B, m]`."""
        self.steps += 1
        self._marked = torch.cat([self.modality, modality], dim=1)
        self.length = self._marked.shape[1]


def check_known(state: Passed | None, past: int) -> Passed:
    """What has passed over a cache that holds `past` tokens.

    Raises:
        UserError: nobody saw it filled, or it was cut back since.
    """
    if state is not None and past < state.length:
        raise UserError(
            f"the cache was cut back from {state.length} to {past} tokens, as assisted and prompt-lookup "
            "decoding do with what they tried out, which cannot be followed; generate without them"
        )
    if state is None or state.length != past:
        raise UserError(
            "the cache was filled outside of this context, so its modalities are unknown; "
            "run the prompt inside the context"
        )
    return state


def check_tried(asked: Any, tokens: int, past: int, given: bool) -> None:
    """Refuse a pass that tries tokens out, as assisted and prompt-lookup decoding do.

    Args:
        asked: `logits_to_keep` of the call: it wants one more than it tries out.
        tokens: tokens of the pass.
        past: tokens in the cache before it.
        given: whether the caller brought a cache, as `generate` does.

    Raises:
        UserError: some of the tokens may be no part of the answer.
    """
    several = isinstance(asked, int) and 1 < asked <= tokens
    if several and (asked == tokens if past else given):
        raise UserError(
            f"a pass that asks for the logits of its last {asked} tokens over a cache is how assisted and "
            "prompt-lookup decoding try tokens out, which cannot be followed; generate without them, or "
            "leave logits_to_keep out"
        )


def check_replaceable(cache: Any) -> None:
    """`UserError` where a cache asks for what the cache of a policy, which takes its place, does not do."""
    kind = "an offloaded" if getattr(cache, "offloading", False) else ""
    kind = "a quantized" if isinstance(cache, QuantizedCache) else kind
    if kind:
        raise UserError(
            f"{kind} cache does nothing under a policy, which brings a cache of its own; leave it out "
            "(a policy's vision_bits stores vision in few bits)"
        )


def appends(cache: Any, layer: int) -> bool:
    """Whether a layer's cache makes a new tensor of old and new keys at each step, and writes into none."""
    layers = getattr(cache, "layers", ())
    return layer < len(layers) and type(layers[layer]) is DynamicLayer


class LeftKeys:
    """The keys that the latest pass left in each cache, by reference alone."""

    def __init__(self) -> None:
        self._left: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()

    def note(self, cache: Any) -> None:
        """A pass over a cache is done."""
        self._left[cache] = [None if keys is None else ref(keys) for keys in _keys(cache)]

    def moved(self, cache: Any) -> bool:
        """Whether a cache holds other keys now: rows were chosen, as beams are, or tokens cut off."""
        left = self._left.get(cache)
        return left is None or any(
            keys is not None if before is None else before() is not keys
            for before, keys in zip(left, _keys(cache), strict=True)
        )


def _keys(cache: Any) -> list[Tensor | None]:
    """The keys of each layer of a cache, None where it has none yet."""
    return [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
