"""A token's score is the attention of the question, its words weighted by how much they matter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer, at_least_one


@dataclass(frozen=True)
class TextWeighted(Scorer):
    """Attention of the newest `rows` text rows, each weighted by what it receives from those rows.

    System rows stand in where a prompt has no text.

    Source: the text-weighted ranking of TGV-KV, arXiv 2606.03075. Written from its description:
    how the authors weigh a text token was not checked against their code.
    """

    rows: int = 64

    def __post_init__(self) -> None:
        at_least_one(self, "rows")

    def score(self, prefill: Prefill) -> Tensor:
        rows, counted = prefill.text_rows(self.rows)
        weights = prefill.weights(rows) * counted
        columns = rows[:, None, None, :].expand(-1, *weights.shape[1:3], -1)
        received = (weights.gather(3, columns) * counted.mT).sum(dim=2)
        share = received / received.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return (weights * share[..., None]).sum(dim=2)
