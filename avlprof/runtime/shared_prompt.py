"""One run of a batch's prompt for several policies: each cuts its own cache out of it.

A policy that drops nothing on the way through the prompt (no `prefill_filter`) acts behind each layer's
attention, so the prompt itself is the stock model's whichever the policy, and its keys, values and first
logits serve all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.gate import Role, layer_roles
from avlprof.attention.session import cache_argument, session_of, switched
from avlprof.errors import UserError
from avlprof.models.generation import greedy
from avlprof.policy import Policy
from avlprof.runtime.apply import runnable
from avlprof.runtime.cache import AVLCache, stock_layers
from avlprof.runtime.captured import forward_as
from avlprof.runtime.forced.prompt import PassThrough
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.runtime.turns import TurnPrefill
from avlprof.scorers import Prefill, Scorer


@dataclass(frozen=True)
class FilledPrompt:
    """A prompt that has run: a policy's cache right after it, and what the model returned."""

    cache: AVLCache
    output: Any


def shares_prompts(model: PreTrainedModel, policy: Policy) -> bool:
    """Whether prompts under a policy can be shared: nothing is dropped on their way, and layers keep KV."""
    kept = (Role.FULL, Role.WINDOW)
    roles = layer_roles(model.config.get_text_config(decoder=True))
    return not policy.prefill_filter and all(role.role in kept and not role.lends for role in roles)


def share_prompt(
    model: PreTrainedModel,
    encoding: Mapping[str, Tensor],
    policies: Sequence[Policy],
    samples: Sequence[str] = (),
) -> list[FilledPrompt]:
    """Run a batch's prompt once, and fill a cache for each policy, in their order.

    Args:
        encoding: a left-padded batch as `generate` takes it.
        policies: of those that share prompts (`shares_prompts`).
        samples: ids of the rows, for messages.

    Raises:
        UserError: a policy cannot share a prompt; as `avlprof.apply` and `avlprof.models.generation.greedy`.
    """
    if (alone := next((own for own in policies if not shares_prompts(model, own)), None)) is not None:
        raise UserError(
            f"policy '{alone.name}' cannot share a prompt: it sets prefill_filter, or layers of "
            f"{type(model).__name__} keep something else than keys and values of their own; run it alone"
        )
    runtime = _Filling(model, policies)
    outputs: list[Any] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(switched(model, runtime=runtime))
        hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        stack.callback(hook.remove)
        greedy(model, encoding, samples, max_new_tokens=1, **{cache_argument(model): runtime.new_cache()})
    runtime.end()
    return [FilledPrompt(cache, outputs[0]) for cache in runtime.caches]


def without_pictures(encoding: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `generate` needs of a batch whose prompt is filled: it would run the vision tower ahead of it."""
    return {name: part for name, part in encoding.items() if not part.is_floating_point()}


@contextlib.contextmanager
def prompt_of(model: PreTrainedModel, filled: FilledPrompt) -> Iterator[None]:
    """Inside `apply` without captured steps, hand out a filled prompt where its batch is run next, once.

    The batch must be the one that the prompt was filled by, and no other may have run since: some models
    remember of their latest prompt where the answer's positions begin.
    """
    session = session_of(model)
    assert session is not None and not session.single
    before = model.forward

    def forward(**inputs: Any) -> Any:
        if session.stepping:
            return before(**inputs)
        cache: AVLCache = inputs[session.cache_name]
        cache.become(filled.cache)
        return type(filled.output)(
            **{name: cache if isinstance(part, Cache) else part for name, part in filled.output.items()}
        )

    with forward_as(model, session, forward):
        yield


class _Caches(Cache):
    """A cache that holds nothing: what it is given is handed to those of several policies."""

    def __init__(self, caches: Sequence[AVLCache], text_config: Any) -> None:
        self.caches = caches
        stock = stock_layers(text_config)
        free = [caches[0].governed(index) is None for index in range(len(stock))]
        super().__init__(
            layers=[own if left else PassThrough(0) for own, left in zip(stock, free, strict=True)]
        )

    @property
    def active(self) -> bool:
        """Whether a pass of the context is at work; see `AVLCache.active`."""
        return self.caches[0].active

    @active.setter
    def active(self, now: bool) -> None:
        for cache in self.caches:
            cache.active = now

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand a prompt's keys and values to each cache; a prompt attends to all of them."""
        for cache in self.caches:
            cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        return key_states, value_states


class _Once(Scorer):
    """A scorer whose scores of a layer's prompt serve all who ask for them."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._scored: tuple[Prefill, Tensor] | None = None

    def score(self, prefill: Prefill) -> Tensor:
        """The scorer's own."""
        if self._scored is None or self._scored[0] is not prefill:
            self._scored = prefill, self.scorer.score(prefill)
        return self._scored[1]


class _Filling:
    """A runtime whose prompts fill the caches of several policies; decoding steps do not come."""

    def __init__(self, model: PreTrainedModel, policies: Sequence[Policy]) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self.caches = [AVLCache(runnable(model, policy), self._config) for policy in policies]
        scorers: dict[str, _Once] = {}
        for cache, layer in self._adaptive():
            layer.scorer = scorers.setdefault(cache.policy.scorer.key, _Once(layer.scorer))

    def _adaptive(self) -> Iterator[tuple[AVLCache, AdaptiveLayer]]:
        for cache in self.caches:
            yield from ((cache, layer) for layer in cache.layers if isinstance(layer, AdaptiveLayer))

    def end(self) -> None:
        """Give the layers their own scorers back, so that no scores are held."""
        for _, layer in self._adaptive():
            if isinstance(layer.scorer, _Once):
                layer.scorer = layer.scorer.scorer

    def new_cache(self) -> _Caches:
        """The cache that fills those of the policies."""
        return _Caches(self.caches, self._config)

    def owns(self, cache: Any) -> bool:
        """Whether a cache is the one that fills those of the policies."""
        return isinstance(cache, _Caches) and cache.caches is self.caches

    def governs(self, cache: Any, layer: int) -> bool:
        """Whether policies decide what a layer attends to."""
        return self.caches[0].governed(layer) is not None

    def attend(self, forward: Forward, cache: Any, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """Stock attention over a prompt, out of which each policy then keeps its own."""
        modality = forward.modality
        if not forward.begun:
            forward.begun = True
            for own in self.caches:
                own.begin(modality)
        out = call.stock()
        batch, seen = modality.shape
        positions = torch.arange(seen, device=modality.device)[None, None].expand(batch, -1, -1)
        turns: dict[bool, TurnPrefill] = {}
        for own in self.caches:
            if own.governed(call.layer) is not None:
                own.check_states(call)
                joint = own.policy.joint is not None
                turn = turns.get(joint) or own.turn_for(call, modality, positions)
                if turn is not None:
                    own.compact(turns.setdefault(joint, turn), call, positions, (0, seen))
        return out, call
