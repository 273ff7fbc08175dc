"""Attention of one query row per sequence with the query heads of a KV group packed as rows.

Each key and value is read once. Where a step wants its attention weights, `step_weights` and
`weighted_values` make the output of the same pass. On a CPU in fp32 that pass is also faster than
the fused kernel when every query head has keys of its own: one row of queries leaves a matrix
kernel idle, and products that stream keys and values do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avlprof.attention.rows import row_logits

_MANY = 1 << 19  # numbers in the keys of all heads from which streaming products win


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention output of one query row per sequence.

    Args:
        query: `[B, H, 1, D]`.
        key, value: `[B, Hkv, N, D]`, views are fine.
        scaling: factor of the dot product.
        mask: bool `[B, 1 or Hkv, 1, N]`, or None when every key is seen.
        softcap: logit soft cap, when the model has one.

    Returns:
        `[B, 1, H, D]`, as transformers' attention functions return it.
    """
    batch, heads, _, size = query.shape
    if softcap is not None or (_streams(key, heads) and key.numel() >= _MANY):
        return weighted_values(step_weights(query, key, scaling, mask, softcap), value)
    rows = query.view(batch, key.shape[1], -1, size)
    out: Tensor = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return torch.reshape(out, (batch, 1, heads, value.shape[-1]))


def step_weights(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax weights `[B, H, N]` of one query row per sequence, in fp32; arguments as above."""
    batch, heads, _, size = query.shape
    length = key.shape[2]
    half = key.dtype in (torch.float16, torch.bfloat16)
    if _streams(key, heads):
        columns = (query * scaling).view(-1, 1, size).mT  # as a transposed row, which MKL reads far faster
        logits = torch.bmm(key.flatten(0, 1), columns).view(batch, heads, 1, length)
    elif half and key.is_cuda and torch.version.hip is None:  # fp32 sums without a copy of the keys in fp32
        rows = query.view(batch * key.shape[1], -1, size)
        products = torch.bmm(rows, key.flatten(0, 1).mT, out_dtype=torch.float32)
        logits = products.mul_(scaling).view(batch, key.shape[1], -1, length)
    else:
        logits = row_logits(query, key, scaling).view(batch, key.shape[1], -1, length)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill_(~mask, float("-inf"))
    return logits.softmax(dim=-1).view(batch, heads, length)


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Output `[B, 1, H, D]` of one query row per sequence: `weights [B, H, N]` by `value [B, Hkv, N, D]`."""
    batch, heads, length = weights.shape
    groups, size = value.shape[1], value.shape[3]
    if _streams(value, heads) and _rows_apart(value):
        # a bag of embeddings is a weighted sum of rows, which reads them at the speed of memory
        every = value.stride(1) // size
        flat = value.as_strided(((batch * heads - 1) * every + length, size), (size, 1))
        first = torch.arange(0, batch * heads * every, every, dtype=torch.int32)
        rows = first[:, None] + torch.arange(length, dtype=torch.int32)
        bags = F.embedding_bag(
            rows, flat, mode="sum", per_sample_weights=weights.reshape(batch * heads, length)
        )
        return bags.view(batch, 1, heads, size)
    packed = weights.to(value.dtype).view(batch, groups, heads // groups, length)
    return torch.reshape(packed @ value, (batch, 1, heads, size))


def _streams(states: Tensor, heads: int) -> bool:
    """Whether products that stream the keys or values beat the fused kernel."""
    return states.device.type == "cpu" and states.dtype == torch.float32 and states.shape[1] == heads


def _rows_apart(value: Tensor) -> bool:
    """Whether all heads of all sequences lie at one distance, in rows of one matrix."""
    batch, heads, length, size = value.shape
    strides = value.stride()
    return (
        length > 0
        and strides[3] == 1
        and strides[2] == size
        and strides[1] % size == 0
        and (batch == 1 or strides[0] == heads * strides[1])
    )
