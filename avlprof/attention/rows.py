"""Attention weights of chosen query rows, without forming the rest of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def row_logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Scaled dot products of query rows with all keys, in fp32.

    Query heads of a KV group are packed as rows, so keys are never repeated.

    Args:
        query: `[B, H, R, D]` post-RoPE query rows.
        key: `[B, Hkv, N, D]` post-RoPE keys; `H` is a multiple of `Hkv`.
        scaling: factor of the dot product.
        softcap: Gemma 2's `softcap * tanh(x / softcap)`, when the model has one.

    Returns:
        `[B, H, R, N]` fp32.
    """
    batch, heads, rows, size = query.shape
    groups = key.shape[1]
    packed = query.float().reshape(batch, groups, heads // groups * rows, size)
    logits = (packed @ key.float().mT) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.view(batch, heads, rows, key.shape[2])


def row_weights(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax attention rows `[B, H, R, N]` in fp32; arguments as in `row_logits`.

    `mask` is bool, broadcastable to `[B, H, R, N]`, True where a row may look; a row that may
    look nowhere is all zero.
    """
    logits = row_logits(query, key, scaling, softcap)
    if mask is None:
        return logits.softmax(dim=-1)
    weights = logits.masked_fill_(~mask, float("-inf")).softmax(dim=-1)
    return weights.nan_to_num(0.0)


def causal_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """Mask `[B, 1, R, N]` of causal attention for the query rows at positions `rows`.

    Args:
        rows: `[B, R]` positions of the query rows.
        valid: `[B, N]` bool, False on padding.
    """
    positions = torch.arange(valid.shape[1], device=valid.device)
    return ((positions <= rows[:, :, None]) & valid[:, None, :])[:, None]


def gather_rows(query: Tensor, rows: Tensor) -> Tensor:
    """The query rows at positions `rows [B, R]` of `query [B, H, N, D]`: `[B, H, R, D]`."""
    index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


def group_mean(weights: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads of each KV head group: `[B, H, ...]` to `[B, Hkv, ...]`."""
    batch, heads, *rest = weights.shape
    return weights.reshape(batch, kv_heads, heads // kv_heads, *rest).mean(dim=2)


def head_logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """`row_logits` of one sequence: `query [H, R, D]`, `key [Hkv, N, D]` to fp32 `[H, R, N]`.

    Half-precision inputs on CUDA are multiplied as they are, with fp32 sums, so that keys are not
    copied to fp32.
    """
    heads, rows, size = query.shape
    packed = query.reshape(len(key), heads // len(key) * rows, size)
    if query.is_cuda and torch.version.hip is None and query.dtype in (torch.float16, torch.bfloat16):
        logits = torch.bmm(packed, key.mT, out_dtype=torch.float32).mul_(scaling)
    else:
        logits = (packed.float() * scaling) @ key.float().mT
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits.view(heads, rows, key.shape[1])
