"""Kernels behind the pass over rows: coverage, sums by kind of row, and what keys receive.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

import triton
import triton.language as tl

from avlprof.tracing.triton_kernels import KNOWN, PAD, UNSEEN, VISION, logits_tile

_ONE = tl.constexpr(0x3F800000)  # bits of 1.0
_LEAST = tl.constexpr(0x33800000)  # of 2 ** -24: smaller shares of the largest weight are one size
_ROUNDING = tl.constexpr(2e-6)  # of a sum in fp32: what is missing by less is not missing
_NOTHING = tl.constexpr(1e-12)  # of a sum


@triton.jit
def coverage_counts(
    covered, codes, lse, rows, covered_rows, vision, shares, out,
    heads, count, slot_count, length,
    causal: tl.constexpr, levels: tl.constexpr, span: tl.constexpr, halvings: tl.constexpr,
):  # fmt: skip
    """Fewest vision tokens that hold each share of one row's vision attention, by bisection.

    The threshold is found by its bits, which order positive floats; weights that are equal to it
    up to a thousandth count as equal.
    """
    index = tl.program_id(1).to(tl.int64)
    b = index // heads
    slot = tl.program_id(0)
    r = tl.load(covered_rows + b * slot_count + slot)
    there = tl.maximum(r, 0)
    at = tl.where(r >= 0, tl.load(rows + b * count + there), -1)
    column = tl.load(vision + b) + tl.arange(0, span)
    code = tl.load(codes + b * length + column, mask=column < length, other=PAD)
    reach = at
    if not causal:
        reach = tl.where(at >= 0, length, -1)
    seen = (code == VISION) & (column <= reach)
    x = tl.load(covered + (index * slot_count + slot) * length + column, mask=seen, other=UNSEEN)
    largest = tl.max(x, axis=0)
    normal = tl.load(lse + index * count + there)
    known = (largest > KNOWN) & (tl.exp(largest - normal) > 0.0)
    weight = tl.where(x > KNOWN, tl.exp(x - largest), 0.0)
    bits = weight.to(tl.int32, bitcast=True)
    total = tl.sum(weight, axis=0)
    every = tl.sum((x > KNOWN).to(tl.float32), axis=0)
    line = out + (index * slot_count + slot) * 2 * levels
    for level in tl.static_range(levels):
        share = tl.load(shares + level)
        wanted = total * share
        low, high = tl.full([], _LEAST, tl.int32), tl.full([], _ONE + 1, tl.int32)
        for _ in range(halvings):
            middle = (low + high) // 2
            enough = tl.sum(tl.where(bits >= middle, weight, 0.0), axis=0) >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        above = tl.sum(tl.where(bits >= high, weight, 0.0), axis=0)
        number = tl.sum((bits >= high).to(tl.float32), axis=0)
        missing = (wanted - above) / low.to(tl.float32, bitcast=True)
        missing -= _ROUNDING * total / low.to(tl.float32, bitcast=True)
        number += tl.maximum(tl.ceil(missing), 0.0)
        if share >= 1.0:  # all but what a sum in fp64 would not notice
            number = tl.sum((weight > _NOTHING * total).to(tl.float32), axis=0)
        number = tl.minimum(tl.maximum(number, 1.0), every)
        tl.store(line + level, tl.where(known, number, 0.0))
        tl.store(line + levels + level, tl.where(known, 1.0, 0.0))


@triton.jit
def kind_sums(
    values, kinds, out, heads, count, columns, row_block: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """Sum of the rows of one kind, which is a bit of `kinds [B, R]`."""
    kind = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    b = index // heads
    column = tl.arange(0, width)
    total = tl.zeros([row_block, width], tl.float32)
    for start in range(0, count, row_block):
        row = start + tl.arange(0, row_block)
        own = (tl.load(kinds + b * count + row, mask=row < count, other=0) >> kind) & 1
        total += tl.load(
            values + (index * count + row)[:, None] * columns + column[None, :],
            mask=(own != 0)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
    tl.store(
        out + (index * tl.num_programs(0) + kind) * columns + column,
        tl.sum(total, axis=0),
        mask=column < columns,
    )


@triton.jit
def received_sums(
    query, key, mask, codes, rows, got, marks, lse, out,
    query_b, query_h, query_n, key_b, key_h, key_n, mask_b, mask_h, mask_r, mask_n,
    count, got_count, heads, group, length, size, scaling, softcap,
    causal: tl.constexpr, masked: tl.constexpr, capped: tl.constexpr, width: tl.constexpr,
    every: tl.constexpr, per_head: tl.constexpr, row_block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives from the last row, text rows and all rows; loads its keys once."""
    index = tl.program_id(1).to(tl.int64)
    groups = heads // group
    b, g = index // groups, index % groups
    begin = tl.program_id(0) * key_block
    column = begin + tl.arange(0, key_block)
    d = tl.arange(0, width)
    k = tl.load(
        key + b * key_b + g * key_h + column.to(tl.int64)[:, None] * key_n + d[None, :],
        mask=(column < length)[:, None] & (d < size)[None, :],
        other=0.0,
    )
    code = tl.load(codes + b * length + column, mask=column < length, other=PAD)
    by_last = tl.zeros([key_block], tl.float32)
    by_text = tl.zeros([key_block], tl.float32)
    by_all = tl.zeros([key_block], tl.float32)
    for member in range(group):
        h = g * group + member
        for start in range(0, got_count, row_block):
            chosen = start + tl.arange(0, row_block)
            r = tl.load(got + b * got_count + chosen, mask=chosen < got_count, other=-1)
            at = tl.load(rows + b * count + r, mask=r >= 0, other=-1)
            reach = begin
            if causal:
                reach = tl.max(at, axis=0)
            if reach >= begin:
                mark = tl.load(marks + b * got_count + chosen, mask=chosen < got_count, other=0)
                q = tl.load(
                    query + b * query_b + h * query_h + at.to(tl.int64)[:, None] * query_n + d[None, :],
                    mask=(at >= 0)[:, None] & (d < size)[None, :],
                    other=0.0,
                )
                base = tl.load(lse + (b * heads + h) * count + r, mask=r >= 0, other=float("inf"))
                x = logits_tile(
                    q, k, at >= 0, at, tl.zeros([row_block], tl.int64) + h, column, code,
                    mask, b, mask_b, mask_h, mask_r, mask_n, length,
                    scaling, softcap, causal, masked, capped,
                )  # fmt: skip
                p = tl.exp(x - base[:, None])
                if every:
                    by_all += tl.sum(p, axis=0)
                by_text += tl.sum(tl.where(((mark & 2) != 0)[:, None], p, 0.0), axis=0)
                if tl.max(mark & 1, axis=0) > 0:
                    by_last += tl.sum(tl.where(((mark & 1) != 0)[:, None], p, 0.0), axis=0)
        if per_head:
            line = out + (b * heads + h) * 3 * length + column
            tl.store(line, by_last, mask=column < length)
            tl.store(line + length, by_text, mask=column < length)
            tl.store(line + 2 * length, by_all, mask=column < length)
            by_last = tl.zeros([key_block], tl.float32)
            by_text = tl.zeros([key_block], tl.float32)
            by_all = tl.zeros([key_block], tl.float32)
    if not per_head:
        line = out + index * 3 * length + column
        tl.store(line, by_last, mask=column < length)
        tl.store(line + length, by_text, mask=column < length)
        tl.store(line + 2 * length, by_all, mask=column < length)
