"""Where the answers of a batch end, and answers that are given instead of found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria

from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.tasks import Sample
from avlprof.tracing.rows import BatchRecorder

CONTROL = (">", "]")  # what the tokens of chat templates end with


class AnswerEnds(StoppingCriteria):
    """Closes the record of a row with its end token, before that token is fed.

    Stops nothing by itself. `lengths` counts the tokens of each row's answer, the end token
    included; `most` bounds them row by row.
    """

    def __init__(self, model: Any, recorder: BatchRecorder, rows: int, most: Sequence[int] | None) -> None:
        ends = model.generation_config.eos_token_id
        self._is_end = EosTokenCriteria(ends) if ends is not None else None
        self._recorder, self._most = recorder, most
        self._live = [True] * rows
        self.lengths = [0] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`input_ids [rows, tokens]` with the token just chosen; returns False for every row."""
        goes_on = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ended = goes_on if self._is_end is None else self._is_end(input_ids, scores)
        for row, end in enumerate(ended.tolist()):
            if self._live[row]:
                self.lengths[row] += 1
                self._live[row] = not end and (self._most is None or self.lengths[row] < self._most[row])
        self._recorder.stop(row for row, live in enumerate(self._live) if not live)
        return goes_on


class GivenAnswers(LogitsProcessor):
    """Makes greedy decoding choose the tokens of given answers, row by row.

    `prompt` is the length of the (padded) prompts; a row whose answer is over gets its last
    token again.
    """

    def __init__(self, answers: Sequence[Sequence[int]], prompt: int) -> None:
        self._answers, self._prompt = answers, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [rows, vocabulary]` with all but one token of each row ruled out."""
        step = input_ids.shape[1] - self._prompt
        wanted = [answer[min(step, len(answer) - 1)] for answer in self._answers]
        index = torch.tensor(wanted, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, index, 0.0)


def reference(sample: Sample) -> str:
    """The first reference answer of a sample; `UserError` when it has none."""
    if not sample.answers or not sample.answers[0].strip():
        raise UserError(
            f"sample '{sample.id}' has no reference answer to trace over; give it one, or trace "
            "what the model answers itself (without forced)"
        )
    return sample.answers[0]


def reference_tokens(loaded: LoadedModel, sample: Sample, last: int) -> list[int]:
    """Tokens of a sample's reference answer as they follow the prompt, with the end token.

    A word behind `ASSISTANT:` begins with a space, one behind a line break or a control token
    does not. Tokenizers write the beginning of a text in ways of their own, so the answer is
    read off behind the prompt's `last` token.
    """
    tokenizer = loaded.processor.tokenizer
    before = str(tokenizer.decode([last]))
    gap = "" if not before or before[-1].isspace() or before.endswith(CONTROL) else " "
    context = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole = tokenizer(before + gap + reference(sample).strip(), add_special_tokens=False)["input_ids"]
    shared = next(
        (place for place, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context)
    )
    return [*whole[shared:], *_end(loaded)]


def longest_reference(loaded: LoadedModel, samples: Sequence[Sample]) -> int:
    """Tokens of the longest reference answer of some samples, near enough to price a run.

    Raises:
        UserError: a sample has none.
    """
    texts = [f" {reference(sample)}" for sample in samples]
    rows = loaded.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return 1 + max(len(row) for row in rows)


def _end(loaded: LoadedModel) -> list[int]:
    """The token that ends an answer, in a list that is empty when the model has none."""
    ends = loaded.model.generation_config.eos_token_id
    known = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    own = loaded.processor.tokenizer.eos_token_id
    return [own] if own is not None and (own in known or not known) else known[:1]
