"""The kernel that measures rows in one pass over their keys, and the one that merges parts of it.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

import triton
import triton.language as tl

from avlprof.attention.modality import Modality
from avlprof.tracing import columns

UNSEEN = tl.constexpr(columns.UNSEEN)  # finite, so that nothing is NaN
KNOWN = tl.constexpr(-1e29)  # largest logits above it are of rows that see something
_SYSTEM = tl.constexpr(int(Modality.SYSTEM))
VISION = tl.constexpr(int(Modality.VISION))
_TEXT = tl.constexpr(int(Modality.TEXT))
_GENERATED = tl.constexpr(int(Modality.GENERATED))
PAD = tl.constexpr(int(Modality.PAD))
_FIXED = tl.constexpr(8)  # values of a row in front of its distance bins
_LEARNED = _LARGEST = tl.constexpr(5)  # where a sum of its own stands in partial sums
_ENTROPY = _SPREAD = tl.constexpr(6)


@triton.jit
def logits_tile(
    q, k, row_seen, at, h, column, code, mask, b, mask_b, mask_h, mask_r, mask_n, length,
    scaling, softcap, causal: tl.constexpr, masked: tl.constexpr, capped: tl.constexpr,
):  # fmt: skip
    """fp32 logits `[rows, keys]`, `UNSEEN` where a row may not look."""
    x = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scaling
    if capped:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # tanh
    seen = row_seen[:, None] & (code != PAD)[None, :]
    if causal:
        seen = seen & (column[None, :] <= at[:, None])
    if masked:
        allowed = tl.load(
            mask + b * mask_b + h[:, None] * mask_h + at[:, None] * mask_r + column[None, :] * mask_n,
            mask=seen & (column < length)[None, :],
            other=0,
        )
        seen = seen & (allowed != 0)
    return tl.where(seen, x, UNSEEN)


@triton.jit
def row_sums(
    query, key, mask,
    codes, order, uniform, first, rows, bins, slots, text_slots,
    out, covered, texts,
    query_b, query_h, query_n, key_b, key_h, key_n, mask_b, mask_h, mask_r, mask_n,
    batch, count, slot_count, text_count, tokens, heads, group, length, size, scaling, softcap,
    keys_each,
    causal: tl.constexpr, masked: tl.constexpr, capped: tl.constexpr, width: tl.constexpr,
    measured: tl.constexpr, history: tl.constexpr,
    bounds: tl.constexpr, bin_width: tl.constexpr, row_block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows over a part of the keys, `keys_each` of them; heads of a group share its tiles.

    What is summed is relative to the largest logit so far, as in FlashAttention.
    """
    index = tl.program_id(1).to(tl.int64)
    b, g = index // (heads // group), index % (heads // group)
    # the last rows see most keys, and begin first
    packed = (tl.num_programs(0) - 1 - tl.program_id(0)) * row_block + tl.arange(0, row_block)
    r = (packed // group).to(tl.int64)
    h = g * group + packed % group
    at = tl.load(rows + b * count + r, mask=r < count, other=-1)
    real = at >= 0
    d = tl.arange(0, width)
    q = tl.load(
        query + b * query_b + h[:, None] * query_h + at.to(tl.int64)[:, None] * query_n + d[None, :],
        mask=real[:, None] & (d < size)[None, :],
        other=0.0,
    )
    start_of_text = tl.load(bins + (b * count + r) * bounds + bounds - 1, mask=real, other=0)
    slot = tl.load(slots + b * count + r, mask=real, other=-1)
    text_slot = tl.load(text_slots + b * count + r, mask=real, other=-1)
    first_key = tl.load(first + b)
    last = length
    if causal:
        last = tl.minimum(tl.max(at, axis=0) + 1, length)
    largest = tl.full([row_block], UNSEEN, tl.float32)
    total = tl.zeros([row_block], tl.float32)
    spread = tl.zeros([row_block], tl.float32)
    system = tl.zeros([row_block], tl.float32)
    vision = tl.zeros([row_block], tl.float32)
    text = tl.zeros([row_block], tl.float32)
    generated = tl.zeros([row_block], tl.float32)
    sink = tl.zeros([row_block], tl.float32)
    text_sink = tl.zeros([row_block], tl.float32)
    distance = tl.zeros([row_block, bin_width], tl.float32)
    bin_index = tl.arange(0, bin_width)
    from_key = tl.maximum(first_key // key_block * key_block, tl.program_id(2) * keys_each)
    for start in range(from_key, tl.minimum(last, (tl.program_id(2) + 1) * keys_each), key_block):
        column = start + tl.arange(0, key_block)
        k = tl.load(
            key + b * key_b + g * key_h + column.to(tl.int64)[:, None] * key_n + d[None, :],
            mask=(column < length)[:, None] & (d < size)[None, :],
            other=0.0,
        )
        code = tl.load(codes + b * length + column, mask=column < length, other=PAD)
        x = logits_tile(
            q, k, real, at, h, column, code, mask, b, mask_b, mask_h, mask_r, mask_n, length,
            scaling, softcap, causal, masked, capped,
        )  # fmt: skip
        if measured:
            if tl.max(slot, axis=0) >= 0:
                place = (b * heads + h) * slot_count + slot
                tl.store(
                    covered + place[:, None] * length + column[None, :],
                    x,
                    mask=(slot >= 0)[:, None] & (column < length)[None, :],
                )
        now = tl.maximum(largest, tl.max(x, axis=1))
        away = x - now[:, None]
        p = tl.exp(away)
        change = tl.exp(largest - now)
        gained = tl.sum(p, axis=1)
        spread = change * (spread + total * (largest - now)) + tl.sum(p * away, axis=1)
        total = total * change + gained
        largest = now
        system *= change
        vision *= change
        text *= change
        generated *= change
        sink *= change
        text_sink *= change
        distance *= change[:, None]
        only = tl.load(uniform + b * tl.cdiv(length, key_block) + start // key_block)
        if only >= 0:
            system += tl.where(only == _SYSTEM, gained, 0.0)
            vision += tl.where(only == VISION, gained, 0.0)
            text += tl.where(only == _TEXT, gained, 0.0)
            generated += tl.where(only == _GENERATED, gained, 0.0)
        else:
            system += tl.sum(tl.where((code == _SYSTEM)[None, :], p, 0.0), axis=1)
            vision += tl.sum(tl.where((code == VISION)[None, :], p, 0.0), axis=1)
            text += tl.sum(tl.where((code == _TEXT)[None, :], p, 0.0), axis=1)
            generated += tl.sum(tl.where((code == _GENERATED)[None, :], p, 0.0), axis=1)
        if start <= first_key:
            sink += tl.sum(tl.where((column == first_key)[None, :], p, 0.0), axis=1)
        if only != _SYSTEM and only != VISION:
            number = tl.load(order + b * length + column, mask=column < length, other=0x7FFFFFFF)[None, :]
            text_sink += tl.sum(tl.where(number < start_of_text[:, None], p, 0.0), axis=1)
            high = tl.load(bins + (b * count + r) * bounds, mask=real, other=0)
            for i in range(bounds - 1):
                low = tl.load(bins + (b * count + r) * bounds + i + 1, mask=real, other=0)
                within = (number < high[:, None]) & (number >= low[:, None])
                part = tl.sum(tl.where(within, p, 0.0), axis=1)
                distance += tl.where(bin_index[None, :] == i, part[:, None], 0.0)
                high = low
            if history:
                place = (b * heads + h) * text_count + text_slot
                tl.store(
                    texts + place[:, None] * tokens + number,
                    x,
                    mask=(text_slot >= 0)[:, None] & (number < tokens),
                )
    # as partial sums, which `row_merge` puts together
    line = (tl.program_id(2) * batch * heads + b * heads + h) * count + r
    sums = out + line * (_FIXED + bounds)
    tl.store(sums, system, mask=r < count)
    tl.store(sums + 1, vision, mask=r < count)
    tl.store(sums + 2, text, mask=r < count)
    tl.store(sums + 3, generated, mask=r < count)
    tl.store(sums + 4, sink, mask=r < count)
    tl.store(sums + _LARGEST, largest, mask=r < count)
    tl.store(sums + _SPREAD, spread, mask=r < count)
    tl.store(sums + 7, text_sink, mask=r < count)
    tl.store(
        sums[:, None] + _FIXED + bin_index[None, :],
        distance,
        mask=(r < count)[:, None] & (bin_index < bounds - 1)[None, :],
    )
    tl.store(sums + _FIXED + bounds - 1, total, mask=r < count)


@triton.jit
def row_merge(
    partial, sinks, out, lse, lines, heads, count,
    splits: tl.constexpr, sunk: tl.constexpr, bounds: tl.constexpr,
    line_block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Values and log-sum-exp of rows, from their partial sums over parts of the keys."""
    line = tl.program_id(0) * line_block + tl.arange(0, line_block)
    column = tl.arange(0, width)
    inside = line < lines
    largest = tl.full([line_block], UNSEEN, tl.float32)
    total = tl.zeros([line_block], tl.float32)
    spread = tl.zeros([line_block], tl.float32)
    sums = tl.zeros([line_block, width], tl.float32)
    for split in range(splits):
        own = partial + (split * lines + line).to(tl.int64) * (_FIXED + bounds)
        most = tl.load(own + _LARGEST, mask=inside, other=UNSEEN)
        number = tl.load(own + _FIXED + bounds - 1, mask=inside, other=0.0)
        wide = tl.load(own + _SPREAD, mask=inside, other=0.0)
        part = tl.load(
            own[:, None] + column[None, :],
            mask=inside[:, None] & (column < _FIXED + bounds - 1)[None, :],
            other=0.0,
        )
        now = tl.maximum(largest, most)
        before, after = tl.exp(largest - now), tl.exp(most - now)
        spread = before * (spread + total * (largest - now)) + after * (wide + number * (most - now))
        total = total * before + number * after
        sums = sums * before[:, None] + part * after[:, None]
        largest = now
    known = largest > KNOWN
    highest, weight, learned = largest, total, tl.zeros([line_block], tl.float32)
    shrunk = tl.full([line_block], 1.0, tl.float32)
    if sunk:
        own_sink = tl.load(sinks + line // count % heads, mask=inside, other=0.0).to(tl.float32)
        highest = tl.maximum(largest, own_sink)
        shrunk = tl.exp(largest - highest)
        weight = total * shrunk + tl.exp(own_sink - highest)
    scale = tl.where(known, shrunk / tl.where(known, weight, 1.0), 0.0)
    if sunk:
        learned = tl.where(known, tl.maximum(1.0 - total * scale, 0.0), 0.0)
    above = highest - largest + tl.log(tl.where(known, weight, 1.0))  # log-sum-exp less the largest logit
    entropy = tl.where(known, above * total * scale - spread * scale, 0.0)
    tl.store(lse + line, tl.where(known, largest + above, float("inf")), mask=inside)
    values = sums * scale[:, None]
    values = tl.where((column == _LEARNED)[None, :], learned[:, None], values)
    values = tl.where((column == _ENTROPY)[None, :], entropy[:, None], values)
    tl.store(
        out + line.to(tl.int64)[:, None] * (_FIXED + bounds - 1) + column[None, :],
        values,
        mask=inside[:, None] & (column < _FIXED + bounds - 1)[None, :],
    )
