"""Attention of a few query rows with the query heads of a KV group packed as rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avlprof.attention.rows import row_weights


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention output of one query row per sequence, reading each key and value once.

    Args:
        query: `[B, H, 1, D]`.
        key, value: `[B, Hkv, N, D]`, views are fine.
        scaling: factor of the dot product.
        mask: bool `[B, 1 or Hkv, 1, N]`, or None when every key is seen.
        softcap: logit soft cap, when the model has one.

    Returns:
        `[B, 1, H, D]`, as transformers' attention functions return it.
    """
    batch, heads, _, _ = query.shape
    if softcap is not None:
        weights = row_weights(query, key, scaling, mask, softcap).to(value.dtype)
        packed = weights.view(batch, value.shape[1], -1, value.shape[2])
        return (packed @ value).view(batch, 1, heads, value.shape[-1])
    rows = query.view(batch, key.shape[1], -1, query.shape[-1])
    out: Tensor = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return torch.reshape(out, (batch, 1, heads, value.shape[-1]))
