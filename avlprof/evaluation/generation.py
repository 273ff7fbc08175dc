"""One greedy `generate()` with a view of its cache, stock or under a policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from avlprof.attention.cache_argument import given_cache
from avlprof.models import LoadedModel
from avlprof.policy import Policy
from avlprof.runtime import Runtime, apply

OnToken = Callable[[Any], None]
"""Called with the cache whenever a token has been chosen; first when prefill has just ended."""


class _Listener(StoppingCriteria):
    """Never stops anything; transformers calls it once a generated token."""

    def __init__(self, told: Callable[[], None]) -> None:
        self.told = told

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.told()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def running(loaded: LoadedModel, policy: Policy | None) -> Iterator[Runtime | None]:
    """The model under `policy`; with None it is left alone."""
    if policy is None:
        yield None
    else:
        with apply(loaded.model, policy) as runtime:
            yield runtime


def generate_tokens(
    loaded: LoadedModel,
    encoding: dict[str, Tensor],
    runtime: Runtime | None,
    on_token: OnToken | None = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    logits_processor: LogitsProcessor | None = None,
) -> Tensor:
    """New token ids `[B, T]` of a greedy answer; rows that ended are padded.

    `runtime` is what `running` gave. The stock model gets the `DynamicCache` that `generate` would
    have made by itself, so that it can be looked at. `logits_processor` may look at the logits of
    every step `[B, V]` and change them.
    """
    if runtime is None:
        cache: Any = DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
    else:
        cache = runtime.new_cache()
    listeners = [_Listener(partial(on_token, cache))] if on_token else []
    ids: Tensor = loaded.model.generate(
        **encoding,
        **given_cache(loaded.model, cache),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([logits_processor] if logits_processor else []),
        stopping_criteria=StoppingCriteriaList(listeners),
    )
    return ids[:, encoding["input_ids"].shape[1] :]
