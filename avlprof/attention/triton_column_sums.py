"""Column sums of attention in two Triton kernels: log-sum-exp of rows, then sums of key blocks.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_BYTES = 1 << 15  # of query or key rows in shared memory: small enough for any device with tensor cores


def triton_column_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    rows: Tensor | None,
    counted: Tensor | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `avlprof.attention.column_sums`; half-precision inputs stay as they are.

    Attention is causal from the positions `rows [B, R]` on; None: every row sees all keys.
    Products are summed in fp32; those of fp32 inputs are not rounded to TF32.
    """
    batch, heads, count, size = query.shape
    groups, length = key.shape[1], key.shape[2]
    # the kernels step through the last dimension one by one
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    causal = rows is not None
    if rows is None:
        rows = torch.zeros(batch, count, device=query.device)
    rows = rows.to(torch.int32).contiguous()
    counts = torch.ones_like(rows) if counted is None else counted.contiguous().view(torch.uint8)
    real = rows if valid is None else valid.contiguous().view(torch.uint8)
    width = max(triton.next_power_of_2(size), 16)
    block = 64 if 64 * width * query.element_size() <= _TILE_BYTES else 32
    lse = torch.empty((batch, heads, count), dtype=torch.float32, device=query.device)
    total = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    shared: tuple[Any, ...] = (
        *query.stride()[:3],
        *key.stride()[:3],
        scaling,
        softcap or 1.0,
        heads,
        heads // groups,
        count,
        length,
        size,
    )
    constants = {
        "causal": causal,
        "padded": valid is not None,
        "capped": softcap is not None,
        "row_block": block,
        "key_block": block,
        "width": width,
    }
    with torch.cuda.device(query.device if query.is_cuda else -1):
        grid = (triton.cdiv(count, block), batch * heads)
        _row_lse[grid](query, key, rows, counts, real, lse, *shared, **constants)
        if sinks is not None:  # all that they change is what a row's weights are divided by
            lse = torch.logaddexp(lse, sinks.float()[None, :, None])
        grid = (triton.cdiv(length, block), batch * heads)
        _key_sums[grid](query, key, rows, real, lse, total, *shared, **constants)
    return total


@triton.jit
def _logits(
    q, k, row, at, column, real, scaling, softcap, count, length,
    causal: tl.constexpr, padded: tl.constexpr, capped: tl.constexpr,
):  # fmt: skip
    """fp32 `[rows, keys]`, minus infinity where a row may not look."""
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if capped:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # tanh
    seen = (row < count)[:, None] & (column < length)[None, :]
    if causal:
        seen = seen & (column[None, :] <= at[:, None])
    if padded:
        seen = seen & (real != 0)[None, :]
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _row_lse(
    query, key, rows, counted, valid, lse,
    query_b, query_h, query_r, key_b, key_h, key_n,
    scaling, softcap, heads, group, count, length, size,
    causal: tl.constexpr, padded: tl.constexpr, capped: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of rows; plus infinity for rows that do not count or see nothing."""
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    d = tl.arange(0, width)
    q = tl.load(
        query + b * query_b + h * query_h + row[:, None] * query_r + d[None, :],
        mask=(row < count)[:, None] & (d < size)[None, :],
        other=0.0,
    )
    at = tl.load(rows + b * count + row, mask=row < count, other=-1)
    last = length
    if causal:
        last = tl.minimum(tl.max(at, axis=0) + 1, length)
    largest = tl.full([row_block], float("-inf"), tl.float32)
    total = tl.zeros([row_block], tl.float32)
    for start in range(0, last, key_block):
        column = start + tl.arange(0, key_block)
        k = tl.load(
            key + b * key_b + (h // group) * key_h + column[:, None] * key_n + d[None, :],
            mask=(column < length)[:, None] & (d < size)[None, :],
            other=0.0,
        )
        real = column
        if padded:
            real = tl.load(valid + b * length + column, mask=column < length, other=0)
        x = _logits(q, k, row, at, column, real, scaling, softcap, count, length, causal, padded, capped)
        now = tl.maximum(largest, tl.max(x, axis=1))
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
        largest = now
    counts = tl.load(counted + b * count + row, mask=row < count, other=0)
    known = (total > 0.0) & (counts != 0)
    value = tl.where(known, largest + tl.log(tl.where(known, total, 1.0)), float("inf"))
    tl.store(lse + index * count + row, value, mask=row < count)


@triton.jit
def _key_sums(
    query, key, rows, valid, lse, out,
    query_b, query_h, query_r, key_b, key_h, key_n,
    scaling, softcap, heads, group, count, length, size,
    causal: tl.constexpr, padded: tl.constexpr, capped: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives from all rows; no two programs add to the same key."""
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    first = tl.program_id(0) * key_block
    column = first + tl.arange(0, key_block)
    d = tl.arange(0, width)
    k = tl.load(
        key + b * key_b + (h // group) * key_h + column[:, None] * key_n + d[None, :],
        mask=(column < length)[:, None] & (d < size)[None, :],
        other=0.0,
    )
    real = column
    if padded:
        real = tl.load(valid + b * length + column, mask=column < length, other=0)
    total = tl.zeros([key_block], tl.float32)
    for start in range(0, count, row_block):
        row = start + tl.arange(0, row_block)
        at = tl.load(rows + b * count + row, mask=row < count, other=-1)
        reach = first
        if causal:
            reach = tl.max(at, axis=0)
        if reach >= first:
            q = tl.load(
                query + b * query_b + h * query_h + row[:, None] * query_r + d[None, :],
                mask=(row < count)[:, None] & (d < size)[None, :],
                other=0.0,
            )
            base = tl.load(lse + index * count + row, mask=row < count, other=float("inf"))
            x = _logits(q, k, row, at, column, real, scaling, softcap, count, length, causal, padded, capped)
            total += tl.sum(tl.exp(x - base[:, None]), axis=0)
    tl.store(out + index * length + column, total, mask=column < length)
