"""The cache of a policy: one layer object per decoder layer, and what it stores and reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from avlprof.attention.call import AttentionCall
from avlprof.attention.gate import governed_roles
from avlprof.attention.modality import Modality, prompt_shapes
from avlprof.errors import UserError
from avlprof.policy import FULL, Policy, PromptShape, broadcast, sizes
from avlprof.runtime.buffers import BufferedLayer, DenseLayer
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.runtime.layout import RowPlan
from avlprof.runtime.step import LayerUse
from avlprof.runtime.support import not_leading
from avlprof.runtime.text_part import TextRule
from avlprof.runtime.turns import TurnPrefill
from avlprof.scorers import make_scorer


class AVLCache(Cache):
    """A transformers `Cache` under a policy; valid inside the context that made it.

    `generate` gets one by itself inside `avlprof.apply`; with a loop of your own pass
    `cache=runtime.new_cache()` (before transformers 5.24 the argument was `past_key_values`).
    """

    def __init__(self, policy: Policy, text_config: Any, adaptive: bool = False) -> None:
        """`adaptive`: also of layers that keep all, which else are dense ones."""
        self.policy = policy
        self.rows: list[PromptShape] = []
        self.turn: list[PromptShape] = []
        self.bucket: Any = None  # of `runtime.buckets`, where its steps are captured
        self.counted = False  # while a step is at work that its layers have counted ahead
        self.length = 0
        self.active = False  # while a pass of the context that the cache belongs to is at work
        self._sizes: dict[int, tuple[int, int]] = {}
        roles, stock = governed_roles(text_config), stock_layers(text_config)
        count = len(stock)
        policy.check_layers(count)
        super().__init__(
            layers=[
                _layer(policy, index, count, adaptive) if role.governed else layer
                for index, (role, layer) in enumerate(zip(roles, stock, strict=True))
            ]
        )
        for index, own in enumerate(self.layers):
            lead = policy.leader(index) if policy.picks else index
            if isinstance(own, AdaptiveLayer) and lead is not None and lead != index:
                own.lead = self._leading(lead)

    def _leading(self, layer: int) -> AdaptiveLayer:
        """A layer that others follow."""
        lead = self.layers[layer]
        if not isinstance(lead, AdaptiveLayer):
            raise not_leading(self.policy, layer)
        return lead

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take a layer's new keys and values, and give what it attends to; as in transformers.

        Raises:
            UserError: the context that the cache belongs to has been left.
        """
        if not self.active:
            raise UserError(
                "this cache was filled under a policy whose context has been left; go on inside "
                "avlprof.apply with the same policy"
            )
        self._sizes[layer_idx] = key_states.shape[1], key_states.shape[-1]
        own = self.layers[layer_idx]
        if not self.counted and isinstance(own, AdaptiveLayer) and own.plans and own.fixed is not None:
            own.loosen()  # a step of a context that captures none
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_states(self, call: AttentionCall) -> None:
        """`UserError` when a layer attends to other keys than it stores."""
        attends, stores = (call.key.shape[1], call.key.shape[-1]), self._sizes.get(call.layer)
        if stores is not None and stores != attends:
            raise UserError(
                f"layer {call.layer} ({type(call.module).__name__}) stores {stores[0]} heads of {stores[1]} "
                f"numbers and attends to {attends[0]} of {attends[1]}, which no policy can cut"
            )

    def row_plans(self, layer: int) -> list[RowPlan]:
        """What each row of the batch keeps in a layer of its latest prompt or turn."""
        count = len(self.layers)
        return [row_plan(self.policy, shape, layer, count) for shape in self.turn]

    def governed(self, layer: int) -> BufferedLayer | None:
        """A layer that the policy governs; None where it is the stock cache's (a window, a state, ...)."""
        own = self.layers[layer]
        return own if isinstance(own, BufferedLayer) else None

    def turn_for(self, call: AttentionCall, modality: Tensor, positions: Tensor) -> TurnPrefill | None:
        """What of a prompt or further turn competes in a layer; None: nothing, attend as stock does.

        `modality [B, q]` and the logical `positions [B, 1, q]` are those of the new tokens.
        """
        layer = self.governed(call.layer)
        turn = None if layer is None else layer.turn_for(call, self.pool(modality), positions)
        return None if turn is None else replace(turn, texts=tuple(shape.text for shape in self.turn))

    def compact(
        self, turn: TurnPrefill, call: AttentionCall, positions: Tensor, span: tuple[int, int]
    ) -> None:
        """Let the tokens of a turn compete in a layer, and free those that go (`AdaptiveLayer.compact`)."""
        layer = self.governed(call.layer)
        assert layer is not None
        layer.compact(turn, call, positions, self.row_plans(call.layer), span)

    def use(self) -> list[LayerUse]:
        """Measured use of every layer that the policy governs."""
        if not self.rows:
            return []
        layers = ((index, self.governed(index)) for index in range(len(self.layers)))
        return [layer.use(index, self.rows, self.length) for index, layer in layers if layer is not None]

    def pool(self, modality: Tensor) -> Tensor:
        """Tokens as the policy tells them apart: in a joint pool all count as text, save for padding."""
        if self.policy.joint is None:
            return modality
        return torch.where(modality == Modality.PAD, modality, modality.new_tensor(int(Modality.TEXT)))

    def begin(self, modality: Tensor) -> None:
        """Note a prompt or a further turn: token counts of every row, and its padded length, of `[B, N]`."""
        self.turn = prompt_shapes(self.pool(modality))
        self.length += modality.shape[1]
        before = self.rows or [PromptShape(0, 0, 0)] * len(self.turn)
        self.rows = [
            PromptShape(a.system + b.system, a.vision + b.vision, a.text + b.text)
            for a, b in zip(before, self.turn, strict=True)
        ]

    def become(self, other: AVLCache) -> None:
        """Take over what another cache of an equal policy holds; that one must not be used any more."""
        for name in ("layers", "rows", "turn", "length", "_sizes"):
            setattr(self, name, getattr(other, name))

    def select_rows(self, rows: Tensor) -> None:
        """Keep the bookkeeping of rows in step with a reordered batch."""
        self.rows = [self.rows[row] for row in rows.tolist()] if self.rows else []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows = [shape for shape in self.rows for _ in range(repeats)]


def stock_layers(text_config: Any) -> list[Any]:
    """The layers of the stock cache."""
    return list(DynamicCache(config=text_config).layers)


def is_sliding(layer: Any) -> bool:
    """Whether a stock layer holds a sliding window."""
    return isinstance(layer, DynamicSlidingWindowLayer)


def _layer(policy: Policy, index: int, count: int, adaptive: bool) -> BufferedLayer:
    dense = is_dense(policy, index, count)
    if dense and not adaptive and not policy.leads(index):
        return DenseLayer()
    return AdaptiveLayer(make_scorer(policy.scorer), TextRule(policy, index, count), dense)


def is_dense(policy: Policy, layer: int, layers: int) -> bool:
    """Whether a policy leaves a layer as the stock model has it."""
    if policy.joint is not None:
        return broadcast(policy.joint.keep, layers)[layer] >= 1.0 and policy.joint.decoding == "grow"
    whole = all(step.after_layer > layer for step in policy.prefill_filter)
    full = policy.bits(layers)[layer] == FULL or policy.vision_compute is not None
    full = full and policy.text_bits(layers)[layer] == FULL
    return policy.compute(layers)[layer] >= 1.0 and policy.text.keeps_all and whole and full


def row_plan(policy: Policy, shape: PromptShape, layer: int, layers: int) -> RowPlan:
    """What one prompt keeps in one layer; in a joint pool all of it counts as text.

    Where vision is stored in few bits, the core is what is in full precision: nothing, without one. Nor is
    there a core where heads differ in how many they keep. System and text in few bits are counted apart.
    """
    size = sizes(policy, shape, layers)[layer]
    rule = TextRule(policy, layer, layers)
    sink = rule.sink(size.text)
    limit = None if rule.grows else rule.room(shape.text, size.text)[0]
    core = 0 if policy.heads == "adaptive" else min(size.core, size.vision - size.packed)
    if policy.text_bits(layers)[layer] < FULL:
        return RowPlan(0, size.vision, core, 0, sink, limit, size.system, size.text)
    return RowPlan(size.system, size.vision, core, size.text, sink, limit)
