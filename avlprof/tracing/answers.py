"""Where the answers of a batch end, and answers that are given instead of found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria

from avlprof.tracing.rows import BatchRecorder


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
