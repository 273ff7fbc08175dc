"""Attention of whole answers under several policies at once, by teacher forcing.

Given the tokens, A-VL is exact in one forward pass: in each layer the core of a step depends
only on that layer's queries and keys of earlier steps, so the refresh rows are scored, the sets
chosen, and all rows attend in parallel, each to its own set. Where scores evict text, or tokens of
a joint pool, the rows of a layer go one after the other instead, for all policies at once. The
prompt's keys are shared by every policy and never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.gate import Role, layer_roles
from avlprof.attention.modality import Modality
from avlprof.errors import UserError
from avlprof.policy import FULL, Policy
from avlprof.runtime.cache import is_sliding, stock_layers
from avlprof.runtime.forced.cores import Told
from avlprof.runtime.forced.packing import PackedRows
from avlprof.runtime.forced.prompt import ForcedCache, PromptLayer, Prompts
from avlprof.runtime.forced.rows import AnswerRows, Plans, with_prompt
from avlprof.runtime.forced.scan import attend_in_order
from avlprof.runtime.forced.sets import VisionSets, always_visible, chosen_prompt

Visible = Callable[[range], Tensor]
Full = Callable[[range], Tensor | None]


class GroupAttention:
    """Attention of answers of similar length: those of the first prompt under all policies come first.

    Args:
        policies: differ in their shares alone.
        length: tokens of the prompts as the model sees them, padding included.
        windows: tokens that each layer's sliding window sees; None where it has none.

    `due` are the steps that refreshed, bool `[B, P, T]` by layer, where a pass went through them one by one.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        prompts: Prompts,
        plans: Plans,
        length: int,
        windows: Sequence[int | None],
    ) -> None:
        self.policies, self.prompts, self.plans, self.length = policies, prompts, plans, length
        self.windows = windows
        self._always: dict[tuple[int, int], Tensor] = {}
        self._told: dict[int, Told] = {}
        self.due: dict[int, Tensor] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Output `[B * P, T, H, D]` of every answer row over what its policy lets it see."""
        policy, prompt = self.policies[0], self.prompts.layers[call.layer]
        window = self.windows[call.layer]
        if window is not None:
            rows = AnswerRows(call, prompt, len(self.policies))
            return _attended(rows, self._by_window(rows, window))
        rows = AnswerRows(call, *self._precision(call.layer))
        groups = 1 if policy.heads == "shared" else prompt.key.shape[1]
        if policy.running is not None:
            return attend_in_order(rows, self.plans, self.prompts, call.layer, groups)
        return _attended(rows, *self._governed(rows, call.layer, groups))

    def _precision(self, layer: int) -> tuple[PromptLayer, int, PromptLayer | None]:
        """The prompt as rows see it, the number of policies, and the prompt as few bits leave it.

        The latter only where what is not core is ever read.
        """
        policy, count, layers = self.policies[0], len(self.policies), len(self.prompts.layers)
        text, bits = policy.text_bits(layers)[layer], policy.bits(layers)[layer]
        if policy.vision_compute is None:
            return self.prompts.stored(layer, text, bits), count, None
        whole = self.prompts.stored(layer, text, FULL)
        reads = policy.triggered or 0 < policy.refresh_interval <= self.plans.steps
        return whole, count, self.prompts.stored(layer, text, bits) if reads and bits < FULL else None

    def _governed(self, rows: AnswerRows, layer: int, groups: int) -> tuple[Visible, Full]:
        policy = self.policies[0]
        always = self._visible_always(layer)
        if policy.joint is not None and policy.evicts_by is not None:
            return lambda block: always[:, None, :, block.start : block.stop], _whole
        chosen = chosen_prompt(self.plans, self.prompts, layer, groups)
        sets = VisionSets(rows, self.plans, chosen, always, layer, self.prompts, self._told)
        if sets.due is not None:
            self.due[layer] = sets.due
        return lambda block: with_prompt(always[:, :, block.start : block.stop], sets.seen(block)), sets.full

    def _visible_always(self, layer: int) -> Tensor:
        modality, policy = self.prompts.layers[layer].modality, self.policies[0]
        key = (self.plans.room_key(layer), id(modality))
        if key not in self._always:
            joint = policy.joint is not None
            grows = joint and policy.evicts_by is None
            self._always[key] = always_visible(modality, self.plans.room(layer), joint, grows)
        return self._always[key]

    def _by_window(self, rows: AnswerRows, window: int) -> Visible:
        """A row sees the `window` newest tokens, itself included, padding not."""
        prompt = rows.prompt
        answer = torch.arange(self.length, self.length + rows.steps, device=prompt.columns.device)
        real = torch.nn.functional.pad(prompt.modality != Modality.PAD, (0, rows.steps), value=True)
        columns = torch.cat([prompt.columns, answer.expand(len(prompt.columns), -1)], dim=1)[:, None]
        age = answer[None, :, None] - columns
        visible = ((age >= 0) & (age < window) & real[:, None])[:, None, None]
        return lambda block: visible[:, :, :, block.start : block.stop]


class RowAttention(Protocol):
    """Attention of the rows of a group, behind prompts of `length` padded tokens."""

    prompts: Prompts
    length: int

    def attend(self, call: AttentionCall) -> Tensor:
        """Output `[B * P, T, H, D]` of every row."""


class ForcedRuntime:
    """Attention of packed answers: each group is laid out in rows, attends, and is packed again."""

    def __init__(self, packed: PackedRows, groups: Sequence[RowAttention]) -> None:
        self.packed, self.groups = packed, groups

    def new_cache(self) -> ForcedCache:
        """A cache of the prompts' padded length."""
        return ForcedCache(len(self.groups[0].prompts.layers), self.groups[0].length)

    def owns(self, cache: object) -> bool:
        """Whether a cache is a forced one."""
        return isinstance(cache, ForcedCache)

    def governs(self, cache: object, layer: int) -> bool:
        """Every layer's."""
        return True

    def attend(self, forward: Forward, cache: object, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """Output `[1, R, H, D]` of all packed rows."""
        out = call.query.new_empty((1, call.query.shape[2], call.query.shape[1], call.value.shape[3]))
        for group, index, real in zip(self.groups, self.packed.indices, self.packed.real, strict=True):
            rows = {
                name: getattr(call, name)[0][:, index].transpose(0, 1) for name in ("query", "key", "value")
            }
            out[0, index[real]] = group.attend(call._replace(mask=None, **rows))[real]
        return out, call


def not_forced(text_config: Any) -> str | None:
    """Why one pass over a known answer does not serve a model's layers; None where it does."""
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
        return "its layers attend in chunks"
    for index, role in enumerate(layer_roles(text_config)):
        if not role.governed and role.role is not Role.WINDOW:
            return f"layer {index} {role.what}"
    return None


def windows(text_config: Any) -> list[int | None]:
    """Tokens that each layer's sliding window sees; None for full attention.

    Raises:
        UserError: a layer attends in yet another way.
    """
    why = not_forced(text_config)
    if why is not None:
        raise UserError(f"answers of this model have to be scored token by token ({why}); use SteppedBatch")
    layers = stock_layers(text_config)
    return [int(layer.sliding_window) if is_sliding(layer) else None for layer in layers]


def _whole(block: range) -> None:
    """All columns are in full precision."""


def _attended(rows: AnswerRows, visible: Visible, whole: Full = _whole) -> Tensor:
    outputs = []
    for block in rows.blocks(range(rows.steps)):
        full = whole(block)
        logits = rows.logits(block, full)
        logits.masked_fill_(~visible(block).unsqueeze(3), float("-inf"))
        outputs.append(rows.mixed(rows.weights(logits), full))
    return rows.joined(outputs)
