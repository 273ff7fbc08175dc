"""Statistics of attention rows, as pure functions of weights and modalities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avlprof.attention.modality import Modality

SPOKEN = (Modality.TEXT, Modality.GENERATED)


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
    return torch.special.entr(weights).sum(dim=-1)


def coverage(weights: Tensor, vision: Tensor, levels: Sequence[int]) -> Tensor:
    """Fewest vision tokens that hold each share (percent) of a row's vision attention.

    Args:
        weights: `[H, R, N]`.
        vision: indices `[V]` of vision columns.
        levels: percentages.

    Returns:
        fp32 `[H, R, len(levels)]` token counts; NaN where a row gives vision no attention.
    """
    ranked = weights[..., vision].sort(dim=-1, descending=True).values.double()
    held = ranked.cumsum(dim=-1)
    total = held[..., -1:]
    wanted = total * torch.tensor([level / 100 for level in levels], dtype=held.dtype, device=held.device)
    counts = (held[..., None, :] < (wanted - 1e-12 * total)[..., None]).sum(dim=-1) + 1
    return torch.where(total > 0, counts.float(), torch.nan)


def text_order(modality: Tensor) -> Tensor:
    """`[N]` number of text and generated tokens at or before each position, less one."""
    spoken = torch.isin(modality, modality.new_tensor([int(code) for code in SPOKEN]))
    return spoken.long().cumsum(dim=0) - 1


def text_distances(
    weights: Tensor, modality: Tensor, rows: Tensor, edges: Sequence[int], sink: int
) -> tuple[Tensor, Tensor]:
    """Where a row's attention to text goes, by distance in text tokens.

    The distance of a key is the number of text and generated tokens from it to the query; the
    first `sink` text tokens are counted apart, so that a window can be judged beside them.

    Args:
        weights: `[H, R, N]`.
        modality: `[N]` codes.
        rows: `[R]` positions of the query rows.
        edges: upper bounds (exclusive) of the distance bins; one more bin is open.

    Returns:
        mass on the sink `[H, R]` and mass by distance `[H, R, len(edges) + 1]`.
    """
    order = text_order(modality)
    columns = torch.isin(modality, modality.new_tensor([int(code) for code in SPOKEN])).nonzero()[:, 0]
    in_sink = order[columns] < sink
    text = weights[..., columns]
    sink_mass = text[..., in_sink].sum(dim=-1)
    far = columns[~in_sink]
    distance = (order[rows][:, None] - order[far][None]).clamp(min=0)
    bins = torch.bucketize(distance, torch.tensor(edges, device=weights.device), right=True)
    masses = weights.new_zeros((*weights.shape[:2], len(edges) + 1))
    masses.scatter_add_(2, bins.expand(weights.shape[0], -1, -1), text[..., ~in_sink])
    return sink_mass, masses


def top_sets(scores: Tensor, share: float) -> Tensor:
    """bool `[..., V]`: the `floor(share * V + 1e-6)` (at least one) best of `scores [..., V]`."""
    count = max(int(share * scores.shape[-1] + 1e-6), 1)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def set_overlap(a: Tensor, b: Tensor) -> Tensor:
    """PPCI: share of one set that is in another of its size; bool `[..., V]` to `[...]`.

    Source: the p-percentile concordance index of A-VL, arXiv 2409.14846.
    """
    return (a & b).sum(dim=-1) / a.sum(dim=-1).clamp(min=1)
