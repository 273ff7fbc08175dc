"""Run a model under a policy: `with avlprof.apply(model, policy): model.generate(...)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import Modality
from avlprof.attention.session import switched
from avlprof.attention.weights import packed_attention, step_weights, weighted_values
from avlprof.budgets.resolve import resolve_by_depth
from avlprof.policy import Policy, find_policy
from avlprof.runtime.cache import AVLCache
from avlprof.runtime.captured import captured_steps, check_capturable
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.runtime.prefill_filter import ShortPrefill
from avlprof.runtime.support import check_supported
from avlprof.scorers import Prefill


@dataclass
class Runtime:
    """A policy at work on a model; `cache` is the one of the latest prompt."""

    policy: Policy
    text_config: Any
    cache: AVLCache | None = None
    captured: bool = False
    short: ShortPrefill = field(default_factory=ShortPrefill)

    def new_cache(self) -> AVLCache:
        """A fresh cache for a new prompt, for loops that do not use `generate`."""
        self.cache = AVLCache(self.policy, self.text_config, adaptive=self.captured)
        return self.cache

    def owns(self, cache: Any) -> bool:
        """Whether a cache acts under this runtime's policy."""
        if not isinstance(cache, AVLCache):
            return False
        return (
            cache.policy is self.policy or cache.policy == self.policy
        )  # comparing takes as long as a layer

    def attend(self, forward: Forward, cache: AVLCache, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """One layer's attention: stock at prompts and in dense layers, packed over the view else."""
        self.cache = cache
        given = forward.step == 0 or forward.new > 1
        seen = forward.modality.shape[1]
        if call.layer == 0:
            self.short.begin()
            if given:
                turn = forward.modality[:, seen - forward.new :]
                cache.begin(as_joint(turn) if self.policy.joint else turn)
        layer = cache.layers[call.layer]
        if given:
            return self._turn(forward, cache, layer, call)
        if not isinstance(layer, AdaptiveLayer):
            return call.stock(), call
        layer.before_step(call.query, call.scaling, call.softcap)
        positions, mask = layer.attended()
        if not layer.weighing:
            out = packed_attention(call.query, call.key, call.value, call.scaling, mask, call.softcap)
            return out, call._replace(mask=None, positions=positions, valid=mask)
        weights = step_weights(call.query, call.key, call.scaling, mask, call.softcap)
        out = weighted_values(weights, call.value)
        after = partial(layer.after_step, weights)
        return out, call._replace(mask=None, positions=positions, valid=mask, after=after)

    def _turn(
        self, forward: Forward, cache: AVLCache, layer: Any, call: AttentionCall
    ) -> tuple[Tensor, AttentionCall]:
        """One layer's attention over a prompt or a further turn, whose tokens then compete to stay."""
        seen, new = forward.modality.shape[1], forward.new
        own = self.short.columns
        modality = forward.modality[:, seen - new :]
        positions = torch.arange(seen - new, seen, device=modality.device)[None, None]
        positions = positions.expand(len(modality), -1, -1)
        if own is not None:
            modality = self.short.modality(modality)
            positions = positions.gather(-1, own[:, None])
        if not isinstance(layer, AdaptiveLayer):
            if call.layer + 1 in self.short.steps:
                self.short.choose(Prefill.of(call, modality), self.policy, cache.turn, call.layer)
            return call.stock(), call
        pool = as_joint(modality) if self.policy.joint else modality
        turn = layer.taken(call, pool, positions)
        shown = call
        if turn.held or own is not None:
            held = layer.positions[..., : turn.held] if layer.positions is not None else positions[..., :0]
            mask = turn.visible(call.query.shape[1])
            places = torch.cat([held, positions.expand(-1, held.shape[1], -1)], dim=-1)
            shown = call._replace(mask=mask, positions=places)
        out = shown.stock()
        if call.layer + 1 in self.short.steps:
            self.short.choose(turn, self.policy, cache.turn, call.layer)
        layer.compact(turn, call, positions, cache.row_plans(call.layer), (seen - new, seen))
        return out, shown


@contextlib.contextmanager
def apply(
    model: PreTrainedModel, policy: Policy | str | Path, captured: int | None = None
) -> Iterator[Runtime]:
    """Run a model under a policy for the length of the context.

    Inside it, `generate` and plain forward calls use the policy's cache by themselves; on exit,
    exceptions included, the model is as it was. `policy` may be a `Policy`, a YAML file, or the
    name of a shipped one. An allocator that it names spreads its share over the model's layers.

    With `captured` decoding steps are captured and replayed, in a CUDA graph on a GPU (see
    `avlprof.runtime.captured`): one capture serves so many steps.

    Raises:
        UserError: the policy does not fit the model, asks for what the runtime cannot do, or names
            an allocator that needs a profile (see `avlprof.budgets.resolve`); steps cannot be
            captured.
    """
    if not isinstance(policy, Policy):
        policy = find_policy(str(policy))
    text_config = model.config.get_text_config(decoder=True)
    policy = resolve_by_depth(policy, text_config.num_hidden_layers)
    runtime = Runtime(policy, text_config, captured=captured is not None)
    check_supported(policy)
    cache = AVLCache(policy, text_config, runtime.captured)  # refuses what does not fit before anything runs
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.short.hooked(model, policy))
        session = stack.enter_context(switched(model, runtime=runtime))
        if captured is not None:
            check_capturable(model, policy, cache, captured)
            stack.enter_context(captured_steps(model, session, captured))
        yield runtime


def as_joint(modality: Tensor) -> Tensor:
    """One pool: every token counts as text, padding stays padding."""
    return torch.where(modality == Modality.PAD, modality, modality.new_tensor(int(Modality.TEXT)))
