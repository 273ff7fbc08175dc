"""Run a model under a policy: `with avlprof.apply(model, policy): model.generate(...)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, AtWork, Forward, StepStates
from avlprof.attention.decode import step_attention
from avlprof.attention.gate import check_traced, governed_layers, unwrapped
from avlprof.attention.session import switched
from avlprof.budgets.resolve import resolve_by_depth
from avlprof.errors import UserError
from avlprof.policy import Policy, find_policy
from avlprof.runtime.buckets import KEPT_BYTES, Buckets
from avlprof.runtime.cache import AVLCache
from avlprof.runtime.captured import captured_steps, check_capturable, check_counts
from avlprof.runtime.packed import stored_attention, with_stored
from avlprof.runtime.prefill_filter import ShortPrefill
from avlprof.runtime.ragged import RaggedHeads
from avlprof.runtime.support import check_runs
from avlprof.scorers import Prefill

Model = TypeVar("Model")
_UNWRAP = "unwrap"


@dataclass
class Runtime:
    """A policy at work on a model; `cache` is the one of the latest prompt."""

    policy: Policy
    text_config: Any
    cache: AVLCache | None = None
    buckets: Buckets | None = None  # where steps are captured
    short: ShortPrefill = field(default_factory=ShortPrefill)

    def new_cache(self) -> AVLCache:
        """A fresh cache for a new prompt, for loops that do not use `generate`."""
        self.cache = AVLCache(self.policy, self.text_config, adaptive=self.buckets is not None)
        return self.cache

    @property
    def captures(self) -> int:
        """How many steps have been captured."""
        return 0 if self.buckets is None else self.buckets.captures

    def release(self) -> None:
        """Let go of captured steps and of the buffers that were kept for later prompts."""
        if self.buckets is not None:
            self.buckets.release()

    def owns(self, cache: Any) -> bool:
        """Whether a cache acts under this runtime's policy."""
        if not isinstance(cache, AVLCache):
            return False
        same = cache.policy is self.policy  # asked first: comparing takes as long as a layer
        return same or cache.policy == self.policy

    def governs(self, cache: AVLCache, layer: int) -> bool:
        """Whether the policy decides what a layer attends to."""
        return cache.governed(layer) is not None

    def attend(self, forward: Forward, cache: AVLCache, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """One layer's attention: stock at prompts and in dense layers, packed over the view else."""
        self.cache = cache
        is_turn = forward.step == 0 or forward.new > 1
        if not forward.begun:
            forward.begun = True
            self._begin(forward, cache, call, is_turn)
        layer = cache.governed(call.layer)
        if layer is not None:
            cache.check_states(call)
        if is_turn:
            return self._turn(forward, cache, call)
        step = None if layer is None else layer.step_for(call.query, call.scaling, call.softcap, call.sinks)
        if layer is None or step is None:
            return call.stock(), call
        view = call._replace(mask=None, positions=step.positions, valid=step.mask)
        if len(step.stored) == 1 and not step.weighing and isinstance(step.stored[0], RaggedHeads):
            joined = step.stored[0].by_kernels(call, step.mask, step.bounds)
            if joined is not None:
                return joined, view._replace(decoded=partial(with_stored, step.stored))
        if step.stored:
            out, weights = stored_attention(step.stored, call, step.mask)
            after = partial(layer.after, step, weights) if step.weighing else None
            return out, view._replace(after=after, decoded=partial(with_stored, step.stored))
        states = StepStates(
            call.query, call.key, call.value, call.scaling, call.softcap, call.sinks, step.mask, step.bounds
        )
        out, means = step_attention(states, step.weighing)
        return out, view if means is None else view._replace(after=partial(layer.after, step, means))

    def _begin(self, forward: Forward, cache: AVLCache, call: AttentionCall, is_turn: bool) -> None:
        """A forward pass reaches the first layer."""
        self.short.begin()
        if is_turn:
            new = forward.modality[:, forward.modality.shape[1] - forward.new :]
            cache.begin(new)
        if self.buckets is not None and forward.step == 0:
            self.buckets.reserve(cache, call)

    def _turn(self, forward: Forward, cache: AVLCache, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """One layer's attention over a prompt or a further turn, whose tokens then compete to stay."""
        seen, new = forward.modality.shape[1], forward.new
        columns = self.short.columns
        modality = forward.modality[:, seen - new :]
        positions = torch.arange(seen - new, seen, device=modality.device)[None, None]
        positions = positions.expand(len(modality), -1, -1)
        if columns is not None:
            modality = self.short.modality(modality)
            positions = positions.gather(-1, columns[:, None])
        turn = cache.turn_for(call, modality, positions)
        if turn is None:
            if call.layer + 1 in self.short.steps:
                self.short.choose(Prefill.of(call, modality), self.policy, cache.turn, call.layer)
            return call.stock(), call
        view = call
        if turn.past or columns is not None:
            mask = turn.visible(call.query.shape[1])
            view = call._replace(mask=mask, positions=turn.all_positions(positions))
        out = view.stock()
        if call.layer + 1 in self.short.steps:
            self.short.choose(turn, self.policy, cache.turn, call.layer)
        cache.compact(turn, call, positions, (seen - new, seen))
        return out, view


@contextlib.contextmanager
def apply(
    model: PreTrainedModel,
    policy: Policy | str | Path,
    captured: int | None = None,
    kept_bytes: int = KEPT_BYTES,
    fused: bool | str | None = None,
) -> Iterator[Runtime]:
    """Run a model under a policy for the length of the context.

    Inside it, `generate` and plain forward calls use the policy's cache by themselves; on exit,
    exceptions included, the model is as it was. `policy` may be a `Policy`, a YAML file, or the
    name of a shipped one. An allocator that it names spreads its share over the model's layers.

    With `captured` decoding steps are captured and replayed, in a CUDA graph on a GPU (see
    `avlprof.runtime.captured`): one capture serves so many steps, and those of later prompts of nearby
    lengths. Buffers that no cache uses are kept for them, `kept_bytes` of them at most; `Runtime.release`
    lets go of them, and so does leaving the context. `fused`: compile what is around attention in
    captured steps (see `avlprof.runtime.fused`), True, False, or a backend of `torch.compile` by name; None:
    on CUDA.

    Raises:
        UserError: the policy does not fit the model, asks for what the runtime cannot do, makes pictures
            smaller (see `avlprof.models.smaller.smaller_pictures`), or names an allocator that needs a
            profile (see `avlprof.budgets.resolve`); steps cannot be captured.
    """
    model = unwrapped(model)
    if not isinstance(policy, Policy):
        policy = find_policy(str(policy))
    check_counts(captured, kept_bytes, fused)
    check_traced(model)
    text_config = model.config.get_text_config(decoder=True)
    policy = runnable(model, policy)
    runtime = Runtime(policy, text_config)
    cache = AVLCache(policy, text_config, captured is not None)  # refuses what does not fit at once
    parts = None
    if captured is not None and (model.device.type == "cuda" if fused is None else fused):
        from avlprof.runtime.fused import FusedParts

        parts = FusedParts(model, fused if isinstance(fused, str) else "inductor")
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.short.hooked(model, policy))
        session = stack.enter_context(switched(model, runtime=runtime))
        if captured is not None:
            check_capturable(model, policy, cache)
            runtime.buckets = Buckets(model, captured, kept_bytes)
            stack.callback(runtime.buckets.forget)
            stack.enter_context(captured_steps(model, session, runtime.buckets, parts))
        yield runtime


def runnable(model: PreTrainedModel, policy: Policy) -> Policy:
    """The policy with the share of its allocator, if it names one, spread over the model's layers.

    Raises:
        UserError: it asks for what the runtime cannot do, or for an allocator that needs a profile.
    """
    text_config: Any = model.config.get_text_config(decoder=True)
    policy = resolve_by_depth(policy, text_config.num_hidden_layers, governed_layers(text_config))
    check_runs(policy)
    return policy


class Unwrap(AtWork, Generic[Model]):
    """Gives a wrapped model back as it was; `runtime` is what `apply` yields. A copy of a model has none."""

    def __init__(self, model: Model, policy: Policy | str | Path, captured: int | None) -> None:
        self._model = model
        self._contexts = contextlib.ExitStack()
        self.runtime = self._contexts.enter_context(apply(unwrapped(model), policy, captured))

    def __call__(self) -> Model:
        """End the policy; what `apply` does on exit. A model that was wrapped again since stays so."""
        if vars(self._model).get(_UNWRAP) is self:
            del vars(self._model)[_UNWRAP]
        self._contexts.close()
        return self._model

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _not_wrapped


def _not_wrapped() -> Any:
    raise UserError("this is a copy of a wrapped model, which is under no policy; unwrap the original")


def wrap(model: Model, policy: Policy | str | Path, captured: int | None = None) -> Model:
    """Put a model under a policy for good, and return it: `apply` without a context.

    The model is the same object with one more attribute, `unwrap`, a method that ends it and returns the
    model as it was; `model.unwrap.runtime` has the cache of the latest prompt. Its config, generation
    config and weights are untouched, so `save_pretrained` writes a stock model; its copies are stock
    models too. A wrapped model is kept in memory until it is unwrapped.

    Args:
        policy: a `Policy`, a YAML file, or the name of a shipped one.
        captured: as in `apply`.

    Raises:
        UserError: as `apply`; the model is under a policy already.
    """
    vars(model)[_UNWRAP] = Unwrap(model, policy, captured)
    return model
