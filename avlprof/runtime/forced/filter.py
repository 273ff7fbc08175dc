"""Prefill under a policy's prefill filter, keeping what forced scoring needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall, Forward
from avlprof.policy import Policy, PromptShape
from avlprof.runtime.forced.cache import ForcedCache
from avlprof.runtime.forced.prompt import Capture
from avlprof.runtime.prefill_filter import ShortPrefill
from avlprof.runtime.turns import Turn


@dataclass
class FilteredPrefill:
    """A runtime whose prompts lose vision tokens on their way; decoding steps do not come.

    `shapes` are the prompts' original counts, of which the filter's shares are meant.
    """

    policy: Policy
    shapes: list[PromptShape]
    capture: Capture
    layers: int
    short: ShortPrefill = field(default_factory=ShortPrefill)

    def new_cache(self) -> ForcedCache:
        """A cache that holds nothing, not even a prompt."""
        return ForcedCache(self.layers, 0)

    def owns(self, cache: object) -> bool:
        """Whether a cache is one of those."""
        return isinstance(cache, ForcedCache)

    def attend(self, forward: Forward, cache: object, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """Stock attention over the tokens that have come so far; the filter then picks those that go on."""
        if call.layer == 0:
            self.short.begin()
        modality = forward.modality
        columns = torch.arange(modality.shape[1], device=modality.device).expand(modality.shape)
        if self.short.columns is not None:
            columns, modality = self.short.columns, self.short.modality(modality)
        none = columns[:, None, :0]
        turn = Turn.taken(call, modality, columns[:, None], none, none.bool())
        if self.short.columns is not None:
            call = call._replace(mask=turn.visible(call.query.shape[1]))
        self.capture.keep(call, turn, columns)
        if call.layer + 1 in self.short.steps:
            self.short.choose(turn, self.policy, self.shapes, call.layer)
        return call.stock(), call
