"""Attention weights of chosen query rows, and of one packed row per sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention rows `[B, H, R, N]` in fp32; arguments as in `row_logits`.

    `mask` is bool, broadcastable to `[B, H, R, N]`, True where a row may look; a row that may
    look nowhere is all zero. `sinks [H]` are learned logits, as in `AttentionCall.sinks`.
    """
    logits = row_logits(query, key, scaling, softcap)
    if mask is not None:
        logits = logits.masked_fill_(~mask, float("-inf"))
    weights = softmax(logits, None if sinks is None else sinks.view(-1, 1, 1))
    return weights if mask is None else weights.nan_to_num(0.0)


def softmax(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension; `sinks`, which broadcast to `[..., 1]`, are one logit more a row.

    What goes to the sink is not returned, so with sinks rows sum to less than 1, and one that sees
    nothing is all zero.
    """
    if sinks is None:
        return logits.softmax(dim=-1)
    sinks = sinks.to(logits.dtype)
    most = torch.maximum(logits.amax(dim=-1, keepdim=True), sinks)
    weights = (logits - most).exp()
    return weights / (weights.sum(dim=-1, keepdim=True) + (sinks - most).exp())


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


_MANY = 1 << 19  # numbers in the keys of all heads from which streaming products win


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output of one query row per sequence.

    Args:
        query: `[B, H, 1, D]`.
        key, value: `[B, Hkv, N, D]`, views are fine.
        scaling: factor of the dot product.
        mask: bool `[B, 1 or Hkv, 1, N]`, or None when every key is seen.
        softcap: logit soft cap, when the model has one.
        sinks: `[H]` learned logits, as in `AttentionCall.sinks`.

    Returns:
        `[B, 1, H, D]`, as transformers' attention functions return it.
    """
    batch, heads, _, size = query.shape
    plain = softcap is None and sinks is None
    if not plain or (_streams(key, heads) and key.numel() >= _MANY):
        return weighted_values(step_weights(query, key, scaling, mask, softcap, sinks), value)
    rows = query.view(batch, key.shape[1], -1, size)
    out: Tensor = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return torch.reshape(out, (batch, 1, heads, value.shape[-1]))


def step_weights(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax weights `[B, H, N]` of one query row per sequence, in fp32; arguments as above."""
    return logit_weights(step_logits(query, key, scaling, softcap), mask, sinks)


def logit_weights(logits: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """Softmax `[B, H, N]` of the logits of `step_logits`, in place where a mask hides some."""
    if mask is not None:
        logits = logits.masked_fill_(~mask, float("-inf"))
    own = None if sinks is None else sinks.view(*logits.shape[1:3], 1)
    return softmax(logits, own).flatten(1, 2)


def step_logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Logits `[B, Hkv, H / Hkv, N]` of one query row per sequence, in fp32; arguments as above."""
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
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
