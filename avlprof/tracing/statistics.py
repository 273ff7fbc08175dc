"""Statistics of attention rows, as pure functions of weights and modalities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avlprof.attention.modality import Modality


def descending(values: Tensor) -> Tensor:
    """fp32 `values` sorted along the last dimension, largest first.

    torch's sort carries the indices along; numpy's, which does not, takes a twentieth of the time.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def modality_mass(weights: Tensor, modality: Tensor) -> Tensor:
    """Share of each row's attention that goes to each modality.

    Args:
        weights: `[H, R, N]` rows that sum to 1.
        modality: `[N]` codes; padding has zero weight.

    Returns:
        `[H, R, 4]` in the order of `MODALITIES`.
    """
    codes = torch.arange(4, device=weights.device)
    return weights @ (modality.to(weights.device)[:, None] == codes).to(weights.dtype)


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy of each row in nat: `[H, R, N]` to `[H, R]`."""
    logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log_()
    return -logs.mul_(weights).sum(dim=-1)


def coverage(weights: Tensor, vision: Tensor | slice, levels: Sequence[int]) -> Tensor:
    """Fewest vision tokens that hold each share (percent) of a row's vision attention.

    Args:
        weights: fp32 `[H, R, N]`.
        vision: indices `[V]` of vision columns, or their slice.
        levels: percentages.

    Returns:
        fp32 `[H, R, len(levels)]` token counts; NaN where a row gives vision no attention.
    """
    held = descending(weights[..., vision]).double().cumsum(dim=-1)
    total = held[..., -1:]
    shares = torch.tensor([level / 100 - 1e-12 for level in levels], dtype=held.dtype, device=held.device)
    counts = torch.searchsorted(held, total * shares) + 1
    return torch.where(total > 0, counts.float(), torch.nan)


def _is_text(modality: Tensor) -> Tensor:
    """bool `[N]`: text of the prompt behind the first picture, and generated tokens."""
    return (modality == Modality.TEXT) | (modality == Modality.GENERATED)


def text_order(modality: Tensor) -> Tensor:
    """`[N]` number of text and generated tokens at or before each position, less one."""
    return _is_text(modality).long().cumsum(dim=0) - 1


def text_distances(
    weights: Tensor, modality: Tensor, rows: Tensor, edges: Sequence[int], sink: int
) -> tuple[Tensor, Tensor]:
    """Where a row's attention to text goes, by distance in text tokens.

    The distance of a key is the number of text and generated tokens behind it, up to the query
    and the query included: 0 for the newest of them. The first `sink` of all text tokens are
    counted apart, so that a window can be judged beside them.

    Args:
        weights: `[H, R, N]`.
        modality: `[N]` codes.
        rows: `[R]` positions of the query rows.
        edges: upper bounds (exclusive) of the distance bins; one more bin is open.

    Returns:
        mass on the sink `[H, R]` and mass by distance `[H, R, len(edges) + 1]`.
    """
    order = text_order(modality)
    columns = _is_text(modality).nonzero()[:, 0]
    text, rest = weights[..., columns], columns[sink:]
    sink_mass = text[..., :sink].sum(dim=-1)
    distance = (order[rows][:, None] - order[rest][None]).clamp(min=0)
    bins = torch.bucketize(distance, torch.tensor(edges, device=weights.device), right=True)
    masses = weights.new_zeros((*weights.shape[:2], len(edges) + 1))
    masses.scatter_add_(2, bins.expand(weights.shape[0], -1, -1), text[..., sink:])
    return sink_mass, masses


def top_sets(scores: Tensor, share: float) -> Tensor:
    """bool `[..., V]`: the `floor(share * V + 1e-6)` (at least one) best of fp32 `scores [..., V]`.

    Of equal scores the lower index wins.
    """
    count = max(int(share * scores.shape[-1] + 1e-6), 1)
    least = descending(scores)[..., count - 1 : count]
    above, tied = scores > least, scores == least
    wanted = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= wanted))


def set_overlap(a: Tensor, b: Tensor) -> Tensor:
    """PPCI: share of one set that is in another of its size; bool `[..., V]` to `[...]`.

    Source: the p-percentile concordance index of A-VL, arXiv 2409.14846.
    """
    return (a & b).sum(dim=-1) / a.sum(dim=-1).clamp(min=1)
