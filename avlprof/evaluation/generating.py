"""Greedy answers to one batch of samples under policies, which share its prompt, and what they cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from avlprof.attention.modality import modality_map, prompt_shapes, vision_token_ids
from avlprof.attention.session import cache_argument
from avlprof.evaluation.batches import prompt_lengths
from avlprof.evaluation.footprint import Footprint, footprints
from avlprof.evaluation.store import Answer, policy_key
from avlprof.models import LoadedModel
from avlprof.models.answers import answer_length, end_tokens
from avlprof.models.generation import greedy
from avlprof.models.smaller import smaller_pictures
from avlprof.policy import DENSE, PicturePolicy, Policy, PromptShape, live_share, read_share
from avlprof.runtime import Runtime
from avlprof.runtime.apply import apply
from avlprof.runtime.shared_prompt import (
    FilledPrompt,
    prompt_of,
    share_prompt,
    shares_prompts,
    without_pictures,
)
from avlprof.tasks import Sample

if TYPE_CHECKING:
    from avlprof.evaluation.answers import AnswerSettings

OnToken = Callable[[Any], None]
"""Called with the cache whenever a token has been chosen; first when prefill has just ended."""


class _Listener(StoppingCriteria):
    """Never stops anything; transformers calls it once a generated token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def running(
    loaded: LoadedModel, policy: Policy | None, filled: FilledPrompt | None = None
) -> Iterator[Runtime | None]:
    """The model under `policy`; with None it is left alone. A prompt that is `filled` does not run again."""
    if policy is None:
        yield None
        return
    with apply(loaded.model, policy) as runtime, contextlib.ExitStack() as stack:
        if filled is not None:
            stack.enter_context(prompt_of(loaded.model, filled))
        yield runtime


def generate_tokens(
    loaded: LoadedModel,
    encoding: dict[str, Tensor],
    runtime: Runtime | None,
    on_token: OnToken | None = None,
    *,
    samples: Sequence[str] = (),
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    logits_processor: LogitsProcessor | None = None,
) -> Tensor:
    """New token ids `[B, T]` of a greedy answer; rows that ended are padded.

    `runtime` is what `running` gave. The stock model gets the `DynamicCache` that `generate` would
    have made by itself, so that it can be looked at. `samples` are the ids of the rows, for
    messages. `logits_processor` may look at the logits of
    every step `[B, V]` and change them.
    """
    if runtime is None:
        cache: Any = DynamicCache(config=loaded.model.config.get_text_config(decoder=True))
    else:
        cache = runtime.new_cache()
    listeners = [_Listener(partial(on_token, cache))] if on_token else []
    ids = greedy(
        loaded.model,
        encoding,
        samples,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        processors=[logits_processor] if logits_processor else [],
        stopping_criteria=StoppingCriteriaList(listeners),
        **{cache_argument(loaded.model): cache},
    )
    return ids[:, encoding["input_ids"].shape[1] :]


SHARED_BYTES: Final = 1 << 30
"""Prompt KV under policies that wait for their turn: so much, or the batch's dense cache, if that is more."""


def answer_batch(
    loaded: LoadedModel,
    batch: Sequence[Sample],
    policies: Sequence[Policy | None],
    settings: AnswerSettings,
) -> Iterator[tuple[Policy | None, list[Answer]]]:
    """The policies, in an order of their own, with their answers to one batch; scores are NaN.

    The batch's prompt runs once for all policies that can share it, as far as their caches may wait beside
    each other.
    """
    shown: dict[PicturePolicy | None, list[Policy | None]] = {}
    for policy in policies:
        shown.setdefault(None if policy is None else policy.pictures, []).append(policy)
    for pictures, alike in shown.items():
        with smaller_pictures(loaded, pictures) as smaller:
            encoding = settings.encoded.of(smaller, batch, pictures)
            prompt = _Prompt(smaller, batch, encoding, settings.max_new_tokens)
            for policy, answers in prompt.answers(alike):
                yield policy, _in_whole(loaded, batch, answers, policy, settings)


def _in_whole(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    answers: list[Answer],
    policy: Policy | None,
    settings: AnswerSettings,
) -> list[Answer]:
    """The answers with the dense bytes of the pictures as they are."""
    if policy is None or not policy.shrinks:
        return answers
    whole = settings.lengths or prompt_lengths(loaded, samples)
    return [
        replace(answer, dense_bytes=answer.dense_bytes * whole[answer.sample] // _tokens(answer))
        for answer in answers
    ]


def _tokens(answer: Answer) -> int:
    """Tokens of the prompt that was answered."""
    return answer.system + answer.vision + answer.text


class _Prompt:
    """A batch, encoded, that is to be answered under policies."""

    def __init__(
        self, loaded: LoadedModel, batch: Sequence[Sample], encoding: dict[str, Tensor], max_new_tokens: int
    ) -> None:
        self._loaded, self._encoding, self._limit = loaded, encoding, max_new_tokens
        self._groups = [sample.group for sample in batch]
        self._ids = [sample.id for sample in batch]
        vision = vision_token_ids(loaded.model.config)
        modality = modality_map(encoding["input_ids"], encoding.get("attention_mask"), vision)
        self._rows = prompt_shapes(modality, loaded.adapter.governed, loaded.adapter.group)

    def answers(self, policies: Sequence[Policy | None]) -> Iterator[tuple[Policy | None, list[Answer]]]:
        """The policies with their answers."""
        for some in self._together(policies):
            filled: list[FilledPrompt | None] = [None] * len(some)
            if len(some) > 1:
                within = [own for policy in some if (own := _within(policy)) is not None]
                with torch.inference_mode():
                    filled = [*share_prompt(self._loaded.model, dict(self._encoding), within, self._ids)]
            for policy in some:
                yield policy, self._answer(policy, filled.pop(0))  # whose cache goes with its answers

    def _together(self, policies: Sequence[Policy | None]) -> Iterator[list[Policy | None]]:
        """Policies that share a prompt, as many as may wait beside each other; the others one by one."""
        layers, tokens = self._loaded.adapter.layers, sum(shape.total for shape in self._rows)
        dense = tokens * layers * self._loaded.adapter.kv_bytes_per_token_per_layer()
        most = max(1.0, SHARED_BYTES / max(dense, 1))
        some: list[Policy | None] = []
        left = most
        for policy in policies:
            own = _within(policy)
            if own is None or not shares_prompts(self._loaded.model, own):
                yield [policy]
                continue
            share = live_share(own, self._rows, layers)
            if some and share > left:
                yield some
                some, left = [], most
            some, left = [*some, policy], left - share
        if some:
            yield some

    @torch.inference_mode()
    def _answer(self, policy: Policy | None, filled: FilledPrompt | None) -> list[Answer]:
        within, rows = _within(policy), self._rows
        measured: list[Footprint] = []

        def look(cache: Any) -> None:
            if not measured:
                measured.extend(footprints(cache, rows))

        encoding = dict(self._encoding) if filled is None else without_pictures(self._encoding)
        with running(self._loaded, within, filled) as runtime:
            new = generate_tokens(
                self._loaded,
                encoding,
                runtime,
                look,
                samples=self._ids,
                max_new_tokens=self._limit,
            ).tolist()
        lengths, texts = said(self._loaded, new)
        return [
            Answer(
                sample=name,
                group=group,
                prediction=text,
                score=float("nan"),
                generated_tokens=length,
                system=shape.system,
                vision=shape.vision,
                text=shape.text,
                live_bytes=used.live,
                dense_bytes=used.dense,
                allocated_bytes=used.allocated,
                read_bytes_per_step=used.dense
                * _read_share(within, shape, self._loaded.adapter.layers, length),
                policy_hash=policy_key(policy),
            )
            for name, group, text, length, shape, used in zip(
                self._ids, self._groups, texts, lengths, rows, measured, strict=True
            )
        ]


def _within(policy: Policy | None) -> Policy | None:
    """What of a policy acts on the cache; None: the model is left alone."""
    if policy is None or (policy.shrinks and policy.of_cache.hash == DENSE.hash):
        return None
    return policy.of_cache


def said(loaded: LoadedModel, new: Sequence[list[int]]) -> tuple[list[int], list[str]]:
    """Tokens of each generated row up to and with its end, and its text."""
    lengths = [answer_length(ids, end_tokens(loaded.model)) for ids in new]
    return lengths, loaded.adapter.decode([ids[:length] for ids, length in zip(new, lengths, strict=True)])


def _read_share(policy: Policy | None, shape: PromptShape, layers: int, length: int) -> float:
    """The first token comes from prefill, so an answer of n tokens takes n - 1 decoding steps."""
    return read_share(policy, [shape], layers, length - 1) if policy else 1.0
