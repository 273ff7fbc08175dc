"""A-VL's history score of text tokens, summed over blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.attention.running import quantile


def history(text: Tensor, order: Tensor, kept: float, decoding: bool) -> Tensor:
    """What some rows add to the history scores of the text tokens, head by head.

    A token starts with its own diagonal weight; each later row adds its weight less the quantile,
    at the share that goes, of the row's weights on text: on older tokens alone in the prompt, on
    the row's own as well while decoding.

    Source: A-VL, arXiv 2409.14846, and its public code.

    Args:
        text: `[H, R, T]` weights of text and generated rows on the text tokens, in their order.
        order: int64 `[R]` place of each row among the text tokens.
        kept: share of text that the quantile is to keep.

    Returns:
        fp64 `[H, T]`.
    """
    place = torch.arange(text.shape[-1], device=text.device)
    older, own = place < order[:, None], place == order[:, None]
    below = quantile(text, (older | own if decoding else older).expand_as(text), 1.0 - kept)
    added = torch.where(older, text - below, 0.0) + torch.where(own, text, 0.0)
    return added.sum(dim=1, dtype=torch.float64)
