"""What a scorer is: a ranking of a layer's prompt tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.attention.column_sums import Seen, column_sums, kernels_run
from avlprof.attention.modality import Modality
from avlprof.attention.weights import causal_rows, gather_rows, row_weights
from avlprof.errors import UserError
from avlprof.policy import ScorerSpec


@dataclass(frozen=True)
class Prefill:
    """One layer right after it attended to the prompt.

    `query [B, H, N, D]`, `key` and `value [B, Hkv, N, D]` are post-RoPE, `modality [B, N]`
    holds `Modality` codes (padding included), `layer` counts from 0. `mask` is what the layer
    attended by, bool `[B or 1, 1, N, N]`; without one it was causal, or with `causal` False
    every token saw every other. `sinks [H]` are learned logits, as in `AttentionCall.sinks`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    modality: Tensor
    scaling: float
    layer: int
    softcap: float | None = None
    mask: Tensor | None = None
    causal: bool = True
    sinks: Tensor | None = None

    @classmethod
    def of(cls, call: AttentionCall, modality: Tensor) -> Prefill:
        """The prompt that a layer was just handed; `modality [B, N]`."""
        return cls(
            query=call.query,
            key=call.key,
            value=call.value,
            modality=modality,
            scaling=call.scaling,
            layer=call.layer,
            softcap=call.softcap,
            mask=call.mask,
            causal=bool(getattr(call.module, "is_causal", True)),
            sinks=call.sinks,
        )

    @property
    def past(self) -> int:
        """Tokens of earlier turns whose keys come before these; 0 for a prompt."""
        return 0

    @property
    def valid(self) -> Tensor:
        """bool `[B, N]`, False on padding."""
        return self.modality != Modality.PAD

    @property
    def last_row(self) -> Tensor:
        """`[B]` position of each row's last prompt token."""
        positions = torch.arange(self.modality.shape[1], device=self.modality.device)
        return torch.where(self.valid, positions, -1).amax(dim=1)

    def text_rows(self, most: int) -> tuple[Tensor, Tensor]:
        """The newest `most` text rows of each prompt, all its rows where it has no text.

        Returns:
            positions `[B, R]`, and bool `[B, 1, R, 1]`, False where a prompt has fewer.
        """
        text = self.modality == Modality.TEXT
        eligible = torch.where(text.any(dim=1, keepdim=True), text, self.valid)
        rows = eligible.long().argsort(dim=1, stable=True)[:, -most:]
        return rows, eligible.gather(1, rows)[:, None, :, None]

    def weights(self, rows: Tensor) -> Tensor:
        """Attention weights `[B, H, R, N]` (fp32) of the query rows at `rows [B, R]`."""
        seen = self._seen(rows)
        query = gather_rows(self.query, rows)
        return row_weights(query, self.key, self.scaling, seen, self.softcap, self.sinks)

    def received(self, rows: Tensor, counted: Tensor) -> Tensor:
        """Sums of the weights of the rows at `rows [B, R]` that are `counted` (bool), fp32 `[B, H, N]`.

        On CUDA, where attention had no mask of its own, kernels add them up and no weights are written.
        """
        if self.mask is not None or self.past or not kernels_run(self.query):
            return (self.weights(rows) * counted[:, None, :, None]).sum(dim=2)
        return column_sums(
            gather_rows(self.query, rows),
            self.key,
            self.scaling,
            Seen(rows=rows, valid=self.valid, causal=self.causal),
            counted=counted,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def _seen(self, rows: Tensor) -> Tensor:
        """bool `[B, 1, R, N]`: which keys the rows attend to."""
        if self.mask is not None:
            mask = self.mask.expand(rows.shape[0], -1, -1, -1)
            index = rows[:, None, :, None].expand(-1, -1, -1, mask.shape[-1])
            return mask.gather(2, index) & self.valid[:, None, None]
        if self.causal:
            return causal_rows(rows, self.valid)
        return self.valid[:, None, None]


def at_least_one(scorer: Scorer, name: str) -> None:
    """`UserError` unless a scorer's number of rows is above 0."""
    value = getattr(scorer, name)
    if value < 1:
        raise UserError(f"{name} of a scorer must be at least 1, got {value}")


class Scorer(ABC):
    """Ranks the tokens of a prompt in one layer; higher scores are kept.

    The runtime calls `score` once a layer, as soon as the layer has attended to the prompt.
    With `heads: shared` it averages the result over query heads; with `kv_head` over the
    query heads of each KV head. Scores of one row must not depend on the other rows of the
    batch, nor on padding.
    """

    @abstractmethod
    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[B, H, N]` (fp32) of every key position; padding may hold anything finite."""


def scorer_over(outer: str, of: str) -> Scorer:
    """The scorer `of` that scorer `outer` builds on; it may build on another one, `pooled:instruction`.

    Raises:
        UserError: a name is not known, or one builds on itself.
    """
    from avlprof.scorers import make_scorer

    if outer in of.split(":"):
        raise UserError(f"scorer '{outer}' cannot build on itself, got of: {of}")
    return make_scorer(ScorerSpec.of(of))
