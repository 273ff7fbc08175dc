"""A-VL's history score of text tokens, summed over blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avlprof.attention.ranking import quantile


def history(text: Tensor, order: Tensor, kept: float, decoding: bool) -> Tensor:
    """What some rows add to the history scores of the text tokens, head by head.

    A token starts with its own diagonal weight; each later row adds its weight less the quantile,
    at the share that goes, of the row's weights on text: on older tokens alone in the prompt, on
    the row's own as well while decoding.

    Source: A-VL, arXiv 2409.14846, and its public code.

    Args:
        text: `[H, R, T]` weights of text and generated rows on the text tokens, in their order.
        order: int64 `[R]` number of each row among the text tokens.
        kept: share of text that the quantile is to keep.

    Returns:
        fp64 `[H, T]`.
    """
    column = torch.arange(text.shape[-1], device=text.device)
    older, own = column < order[:, None], column == order[:, None]
    below = quantile(text, (older | own if decoding else older).expand_as(text), 1.0 - kept)
    added = torch.where(older, text - below, 0.0) + torch.where(own, text, 0.0)
    return added.sum(dim=1, dtype=torch.float64)


def descending(values: Tensor) -> Tensor:
    """fp32 `values` sorted along the last dimension, largest first.

    torch's sort carries the indices along; numpy's, which does not, takes a twentieth of the time.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def entropy(logits: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """Shannon entropy of each row in nat, from the logits and their softmax: `[..., n]` to `[...]`.

    It is `lse - sum(w * logit)`, and the log-sum-exp follows from the largest logit and its weight,
    so no logarithm is taken of every weight. Logits must be finite. `total [...]` is what the weights
    sum to where a learned sink has the rest, whose own term is left out: `-sum(w * ln w)` over keys.
    """
    largest = logits.amax(dim=-1)
    mean: Tensor = torch.linalg.vecdot(weights, logits)
    if total is None:
        return largest - weights.amax(dim=-1).log() - mean
    seen = weights.amax(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)  # a sink may leave nothing
    return (largest - seen.log()) * total - mean


def coverage(ordered: Tensor, shares: Tensor) -> Tensor:
    """Fewest vision tokens that hold each share of a row's vision attention.

    Args:
        ordered: `[..., V]` a row's weights on vision, largest first.
        shares: fp64 `[S]` in (0, 1].

    Returns:
        fp32 `[..., S]` token counts; NaN where a row gives vision no attention.
    """
    sums = ordered.cumsum(dim=-1, dtype=torch.float64)
    total = sums[..., -1:]
    counts = torch.searchsorted(sums, total * (shares - 1e-12)) + 1
    return torch.where(total > 0, counts.float(), torch.nan)


def distance_bins(order: Tensor, edges: Sequence[int], first: int, count: int) -> Tensor:
    """Bounds of each row's distance bins among the text tokens: int64 `[R, len(edges) + 2]`, falling.

    The distance of a key is the number of text and generated tokens behind it, up to the query
    and the query included: 0 for the newest of them, and for keys behind the query. So bin i,
    distances below `edges[i]` and not below the edge before, is the run of text tokens from
    bound i + 1 up to bound i. The last bin is open, and ends at the `first` token that counts.

    Args:
        order: int64 `[R]` number of text and generated tokens up to each row, less one.
        edges: upper bounds (exclusive) of the bins but the last.
        first: text tokens at the beginning that are in no bin.
        count: text tokens in all.
    """
    inner = (order[:, None] - torch.tensor(edges, dtype=torch.long) + 1).clamp(first, count)
    newest, oldest = inner.new_full((len(order), 1), count), inner.new_full((len(order), 1), first)
    return torch.cat([newest, inner, oldest], dim=1)


def text_distances(text: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row's attention to text goes, by distance in text tokens.

    Args:
        text: `[H, R, T]` weights on the text and generated tokens, in their order; later ones,
            which no row sees, may be left out.
        bins: the rows' `distance_bins`.

    Returns:
        mass on the first tokens `[H, R, 1]`, which are in no bin so that a window can be judged
        beside them, and mass by distance `[H, R, len(edges) + 1]`.
    """
    # a bin is a run of columns, so its mass is a difference of two cumulative sums
    sums = torch.nn.functional.pad(text.cumsum(dim=-1), (1, 0))
    bounds = sums.gather(2, bins.clamp(max=text.shape[-1]).expand(len(text), -1, -1))
    return bounds[..., -1:], bounds[..., :-1] - bounds[..., 1:]


def top_sets(scores: Tensor, share: float, ordered: Tensor | None = None) -> Tensor:
    """bool `[..., V]`: the `floor(share * V + 1e-6)` (at least one) best of fp32 `scores [..., V]`.

    Of equal scores the lower index wins. `ordered` are the scores sorted, if they are at hand.
    """
    count = max(int(share * scores.shape[-1] + 1e-6), 1)
    least = (descending(scores) if ordered is None else ordered)[..., count - 1 : count]
    above, tied = scores > least, scores == least
    missing = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= missing))


def set_overlaps(sets: Tensor) -> Tensor:
    """PPCI of all pairs: the share of one set that is in another; bool `[H, T, V]` to fp32 `[H, T, T]`.

    Source: the p-percentile concordance index of A-VL, arXiv 2409.14846.
    """
    members = sets.float()  # sums of ones are exact
    shared: Tensor = members @ members.mT
    return shared / members.sum(dim=-1)[:, :, None].clamp(min=1)
