"""Run a model under a policy: `with avlprof.apply(model, policy): model.generate(...)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import Modality
from avlprof.attention.packed import packed_attention
from avlprof.attention.session import switched
from avlprof.policy import Policy, find_policy
from avlprof.runtime.adaptive import AdaptiveLayer
from avlprof.runtime.cache import AVLCache
from avlprof.runtime.support import check_supported
from avlprof.scorers import Prefill


@dataclass
class Runtime:
    """A policy at work on a model; `cache` is the one of the latest prompt."""

    policy: Policy
    text_config: Any
    cache: AVLCache | None = None

    def new_cache(self) -> AVLCache:
        """A fresh cache for a new prompt, for loops that do not use `generate`."""
        self.cache = AVLCache(self.policy, self.text_config)
        return self.cache

    def owns(self, cache: Any) -> bool:
        """Whether a cache acts under this runtime's policy."""
        return isinstance(cache, AVLCache) and cache.policy is self.policy

    def attend(self, forward: Forward, cache: AVLCache, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """One layer's attention: stock in prefill and in dense layers, packed over the view else."""
        self.cache = cache
        if forward.step == 0 and call.layer == 0:
            cache.begin(as_joint(forward.modality) if self.policy.joint else forward.modality)
        layer = cache.layers[call.layer]
        if not isinstance(layer, AdaptiveLayer):
            return call.stock(), call
        if layer.filling:
            out = call.stock()
            modality = as_joint(forward.modality) if self.policy.joint else forward.modality
            layer.compact(Prefill.of(call, modality), cache.row_plans(call.layer))
            return out, call
        positions, mask = layer.attended()
        out = packed_attention(call.query, call.key, call.value, call.scaling, mask, call.softcap)
        shown = replace(call, mask=None, positions=positions, valid=mask)
        layer.after_step(call.query, call.scaling, call.softcap)
        return out, shown


@contextlib.contextmanager
def apply(model: PreTrainedModel, policy: Policy | str | Path) -> Iterator[Runtime]:
    """Run a model under a policy for the length of the context.

    Inside it, `generate` and plain forward calls use the policy's cache by themselves; on exit,
    exceptions included, the model is as it was. `policy` may be a `Policy`, a YAML file, or the
    name of a shipped one.

    Raises:
        UserError: the policy does not fit the model or asks for what the runtime cannot do.
    """
    if not isinstance(policy, Policy):
        policy = find_policy(str(policy))
    runtime = Runtime(policy, model.config.get_text_config(decoder=True))
    check_supported(policy)
    AVLCache(policy, runtime.text_config)  # refuses a policy that does not fit before anything runs
    with switched(model, runtime=runtime):
        yield runtime


def as_joint(modality: Tensor) -> Tensor:
    """One pool: every token counts as text, padding stays padding."""
    return torch.where(modality == Modality.PAD, modality, modality.new_tensor(int(Modality.TEXT)))
