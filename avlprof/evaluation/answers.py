"""Greedy answers to samples, with their bytes; which samples are answered, and how."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from avlprof.attention.modality import modality_map, prompt_shapes, vision_token_ids
from avlprof.attention.session import cache_argument
from avlprof.errors import UserError
from avlprof.evaluation.batches import EncodedBatches, answer_batches, prompt_lengths
from avlprof.evaluation.doubts import check_finite
from avlprof.evaluation.footprint import Footprint, footprints
from avlprof.evaluation.store import STOCK, Answer, AnswerStore, Ask, model_key
from avlprof.models import LoadedModel
from avlprof.models.answers import answer_length, end_tokens
from avlprof.models.generation import greedy
from avlprof.models.smaller import smaller_pictures
from avlprof.policy import DENSE, Policy, PromptShape, read_share
from avlprof.runtime import Runtime
from avlprof.runtime.apply import apply
from avlprof.tasks import Sample, Task, load_metric
from avlprof.versions import versions
from avlprof.watch import SILENT, Watch


@dataclass(frozen=True)
class AnswerSettings:
    """How samples are answered and judged.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        batch_size: samples generated at a time.
        metric: what judges an answer (`avlprof.tasks`).
        lengths: prompt tokens by sample id, when known (`prompt_lengths`); they only order.
        said: tokens of answers by sample id, as far as known; they only order.
        encoded: batches that were encoded before.
    """

    max_new_tokens: int
    batch_size: int = 16
    metric: str = "exact_match"
    lengths: Mapping[str, int] | None = None
    said: Mapping[str, int] = field(default_factory=dict)
    encoded: EncodedBatches = field(default_factory=EncodedBatches, compare=False, repr=False)

    def knowing(self, said: Mapping[str, int]) -> AnswerSettings:
        """With the tokens of answers known: other samples come together, so encoded batches are let go."""
        return replace(self, said=said, encoded=EncodedBatches())


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Which samples are answered, and how: what an evaluation and a comparison have in common.

    Attributes:
        split: which split of the task.
        samples: how many of it, its first ones; None means what the task calls the split.
        max_new_tokens: the longest answer; None is the task's.
        batch_size: samples generated at a time.

    Raises:
        UserError: a number is below 1.
    """

    split: str = "held-out"
    samples: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more samples, got {self.batch_size}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")

    def answering(self, loaded: LoadedModel, task: Task, samples: Sequence[Sample]) -> AnswerSettings:
        """How these samples of a task are answered; batches need the lengths of their prompts."""
        lengths = prompt_lengths(loaded, samples) if self.batch_size > 1 else None
        limit = self.max_new_tokens or task.max_new_tokens
        return AnswerSettings(limit, self.batch_size, task.metric, lengths)

    def ask(self, policy: Policy | None, samples: Sequence[Sample], answering: AnswerSettings) -> Ask:
        """These samples of the split, to be answered under a policy."""
        return Ask(policy, self.split, self.samples, samples, answering)

    def about(self, loaded: LoadedModel, task: Task, samples: int) -> dict[str, Any]:
        """Model, task, split, counts, versions and time: the part of `meta` that all results have.

        With the layers that shares are of, where policies leave others as they are.
        """
        own = loaded.adapter.governed
        return ({} if own is None else {"governed": list(own)}) | {
            "model": loaded.source,
            "revision": loaded.revision or "",
            "checkpoint": loaded.settings,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "task": task.name,
            "dataset": dict(task.provenance),
            "metric": task.metric,
            "split": self.split,
            "samples": samples,
            "max_new_tokens": self.max_new_tokens or task.max_new_tokens,
            "batch_size": self.batch_size,
            "versions": versions(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


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


FLUSH_SECONDS = 10.0


def generate_answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policy: Policy | None,
    settings: AnswerSettings,
    *,
    store: AnswerStore | None = None,
    watch: Watch = SILENT,
) -> list[Answer]:
    """A greedy answer to every sample, in their order; the stock model's when `policy` is None.

    Samples of like prompt and answer length share a batch, padded on the left. Answers in `store` are not
    generated again, and new ones are on disk every few seconds, so a second call resumes. What `pictures` of
    a policy says is done here; dense bytes are those of the pictures as they are.

    Bytes of a row: live, dense and allocated ones are read off the cache right after prefill (see
    `footprint`). Read bytes a step are `policy.read_share` at the row's own answer length, since a
    batch decodes on until its longest answer ends; the runtime's counters agree where a batch has
    one row.

    Args:
        settings: how long answers may be, how many are made at a time, and what judges them.
        watch: its phase `answers` counts answers, those in `store` included.

    Raises:
        UserError: the policy does not fit, a picture cannot be read or made smaller, or a sample has no
            answers.
    """
    judge, limit = load_metric(settings.metric), settings.max_new_tokens
    model = model_key(loaded)
    known = store.answers(model, policy, samples, limit) if store else {}
    todo = [sample for sample in samples if sample.id not in known]
    flushed = time.monotonic()
    watch.phase("answers", len(known), len(samples))
    shown = None if policy is None else policy.pictures
    try:
        for batch in answer_batches(loaded, todo, settings):
            with smaller_pictures(loaded, shown) as smaller:
                encoding = settings.encoded.of(smaller, batch, shown)
                answers = _answer(smaller, batch, encoding, policy, limit)
            answers = _in_whole(loaded, batch, answers, policy, settings)
            for sample, answer in zip(batch, answers, strict=True):
                known[sample.id] = answer
                if store:
                    store.add(model, sample, limit, answer)
            watch.phase("answers", len(known), len(samples))
            if store and time.monotonic() - flushed > FLUSH_SECONDS:
                store.flush()
                flushed = time.monotonic()
    finally:
        if store:
            store.flush()
    scores = np.array([judge(known[sample.id].prediction, sample.answers) for sample in samples], float)
    check_finite(scores, settings.metric, [sample.id for sample in samples])
    return [
        replace(known[sample.id], score=float(score)) for sample, score in zip(samples, scores, strict=True)
    ]


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


@torch.inference_mode()
def _answer(
    loaded: LoadedModel,
    batch: Sequence[Sample],
    encoding: dict[str, Tensor],
    policy: Policy | None,
    max_new_tokens: int,
) -> list[Answer]:
    vision = vision_token_ids(loaded.model.config)
    modality = modality_map(encoding["input_ids"], encoding.get("attention_mask"), vision)
    rows = prompt_shapes(modality, loaded.adapter.governed, loaded.adapter.group)
    measured: list[Footprint] = []
    within = policy and policy.of_cache
    if policy is not None and policy.shrinks and policy.of_cache.hash == DENSE.hash:
        within = None

    def look(cache: Any) -> None:
        if not measured:
            measured.extend(footprints(cache, rows))

    runtime: Runtime | None
    with running(loaded, within) as runtime:
        ids = [sample.id for sample in batch]
        new = generate_tokens(
            loaded, encoding, runtime, look, samples=ids, max_new_tokens=max_new_tokens
        ).tolist()
    lengths, texts = said(loaded, new)
    return [
        Answer(
            sample=sample.id,
            group=sample.group,
            prediction=text,
            score=float("nan"),
            generated_tokens=length,
            system=shape.system,
            vision=shape.vision,
            text=shape.text,
            live_bytes=used.live,
            dense_bytes=used.dense,
            allocated_bytes=used.allocated,
            read_bytes_per_step=used.dense * _read_share(within, shape, loaded.adapter.layers, length),
            policy_hash=policy.hash if policy else STOCK,
        )
        for sample, text, length, shape, used in zip(batch, texts, lengths, rows, measured, strict=True)
    ]


def said(loaded: LoadedModel, new: Sequence[list[int]]) -> tuple[list[int], list[str]]:
    """Tokens of each generated row up to and with its end, and its text."""
    lengths = [answer_length(ids, end_tokens(loaded.model)) for ids in new]
    return lengths, loaded.adapter.decode([ids[:length] for ids, length in zip(new, lengths, strict=True)])


def _read_share(policy: Policy | None, shape: PromptShape, layers: int, length: int) -> float:
    """The first token comes from prefill, so an answer of n tokens takes n - 1 decoding steps."""
    return read_share(policy, [shape], layers, length - 1) if policy else 1.0
