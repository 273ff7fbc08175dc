"""Scores that run while decoding, by which refreshes pick a core: the prompt's, and of rows since."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.ranking import averaged, core_scores
from avlprof.policy import CoreScore


class CoreScores:
    """Running scores of one layer's vision tokens, kept by logical position: slots may change places freely.

    `prompt` is fp32 `[B, G, n]`, what the scorer gave each token at its prompt or turn, and `mean
    [B, G, n + 1]` the running mean of the rows that saw it, below 0 where none has; its last column takes
    what is written for slots that hold nothing. `G` is 1, or the layer's KV heads.
    """

    def __init__(self, rule: CoreScore) -> None:
        self.rule = rule
        self.prompt: Tensor | None = None
        self._mean: Tensor | None = None

    def extend(self, scores: Tensor, positions: Tensor, end: int) -> None:
        """Take the scores `[B, G, N]` of a turn's tokens at `positions [B, 1, N]`; what is held stays.

        `end` is the logical position behind the turn.
        """
        before = scores.new_zeros((*scores.shape[:2], 0)) if self.prompt is None else self.prompt
        mean = before if self._mean is None else self._mean[..., :-1]
        prompt = pad(before, (0, end - before.shape[-1]))
        self.prompt = prompt.scatter(-1, positions.expand_as(scores), scores.float())
        self._mean = pad(mean, (0, end + 1 - mean.shape[-1]), value=-1.0)

    def add(self, row: Tensor, positions: Tensor, seen: Tensor) -> None:
        """Count a step's attention `row [B, G, n]` to slots at `positions [B, G, n]`.

        `seen`, bool `[B, 1, n]`, are those of them that hold vision.
        """
        assert self._mean is not None
        index = self._index(positions, seen)
        now = averaged(self._mean.gather(-1, index), row.detach(), seen, self.rule.memory)
        self._mean.scatter_(-1, index, now)

    def of(self, positions: Tensor, vision: Tensor) -> Tensor:
        """What a refresh ranks slots at `positions [B, G, n]` by, fp32 `[B, G, n]`; see `core_scores`.

        `vision`, bool `[B, 1, n]`, are those that hold vision.
        """
        assert self.prompt is not None and self._mean is not None
        index = self._index(positions, vision)
        prompt = pad(self.prompt, (0, 1)).gather(-1, index)
        return core_scores(prompt, self._mean.gather(-1, index), vision, self.rule.prompt)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by its rows `rows`, in that order and with repeats."""
        if self.prompt is not None and self._mean is not None:
            self.prompt, self._mean = (part.index_select(0, rows) for part in (self.prompt, self._mean))

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind the scores."""
        parts = [part for part in (self.prompt, self._mean) if part is not None]
        return sum(part.untyped_storage().nbytes() for part in parts)

    def _index(self, positions: Tensor, present: Tensor) -> Tensor:
        """Columns of slots; those of slots that hold nothing are the last."""
        assert self.prompt is not None
        return torch.where(present, positions, self.prompt.shape[-1])
