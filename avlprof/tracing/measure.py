"""Measuring a block of attention rows: logits in, one vector of statistics a row out."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.tracing import statistics
from avlprof.tracing.columns import Columns

UNSEEN = -1e30  # logit of a key that a row may not see: finite, and its weight is 0


def row_values(logits: Tensor, weights: Tensor, columns: Columns, bins: Tensor) -> tuple[Tensor, Tensor]:
    """What is known of each row, in the order of `sums.FIXED` and the distance bins.

    Args:
        logits: `[H, R, n]` over the first n keys, `UNSEEN` where a row may not look.
        weights: their softmax.
        bins: the rows' `statistics.distance_bins`.

    Returns:
        `[H, R, C]`, and the weights on text `[H, R, T]`.
    """
    length = weights.shape[-1]
    # groups first: multiplying by so few columns takes three times as long the other way around
    masses = (columns.groups[:, :length] @ weights.view(-1, length).mT).mT.view(*weights.shape[:2], -1)
    spread = statistics.entropy(logits, weights)[..., None]
    text = columns.text.of_first(weights)
    sink, distance = statistics.text_distances(text, bins)
    return torch.cat([masses, spread, sink, distance], dim=-1), text
