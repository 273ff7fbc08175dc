"""The kernels of a decoding step: one that attends to parts of the keys, and one that merges them.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

import triton
import triton.language as tl

from avlprof.attention import column_sums

UNSEEN = tl.constexpr(column_sums.UNSEEN)  # finite, so that nothing is NaN


@triton.jit
def unpacked_tile(
    codes, scale, offset, line, there, dtype: tl.constexpr,
    bits: tl.constexpr, group: tl.constexpr, size: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Tokens `line` of packed numbers, `[tokens, width]`; 0 where there is none."""
    if bits == 8:
        d = tl.arange(0, width)
        code = tl.load(
            codes + line[:, None] * size + d[None, :], mask=there[:, None] & (d < size)[None, :], other=0
        )
    else:
        each: tl.constexpr = 8 // bits  # codes of a byte
        byte = tl.arange(0, width // each)
        packed = tl.load(
            codes + line[:, None] * (size // each) + byte[None, :],
            mask=there[:, None] & (byte < size // each)[None, :],
            other=0,
        )
        if bits == 4:
            code = tl.interleave(packed & 15, packed >> 4)
        else:
            tl.static_assert(bits == 2)
            even = tl.interleave(packed & 3, (packed >> 4) & 3)
            code = tl.interleave(even, tl.interleave((packed >> 2) & 3, packed >> 6))
    groups: tl.constexpr = size // group
    if (group & (group - 1)) == 0:  # one load a group, spread over its channels
        part = tl.arange(0, width // group)
        mask = there[:, None] & (part < groups)[None, :]
        at = line[:, None] * groups + part[None, :]
        shape: tl.constexpr = (there.shape[0], width // group, group)
        a = tl.broadcast_to(tl.load(scale + at, mask=mask, other=0.0)[:, :, None], shape)
        z = tl.broadcast_to(tl.load(offset + at, mask=mask, other=0.0)[:, :, None], shape)
        x = tl.reshape(tl.reshape(code, shape).to(tl.float32) * a + z, (there.shape[0], width))
    else:
        channel = tl.arange(0, width)
        mask = there[:, None] & (channel < size)[None, :]
        at = line[:, None] * groups + (channel // group)[None, :]
        x = code.to(tl.float32) * tl.load(scale + at, mask=mask, other=0.0)
        x += tl.load(offset + at, mask=mask, other=0.0)
    return x.to(dtype)


@triton.jit
def folded_tile(
    q, k, there, line, stored, most, total, scaling, softcap,
    capped: tl.constexpr, weighing: tl.constexpr,
):  # fmt: skip
    """A block of keys: weights relative to the largest logit so far, what shrinks earlier ones, and tallies.

    Where they are wanted, logits go to `line` of the rows that are `stored`.
    """  # fmt: skip
    x = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scaling
    if capped:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # tanh
    if weighing:
        tl.store(line, x, mask=stored[:, None] & there[None, :])
    now = tl.maximum(most, tl.max(tl.where(there[None, :], x, UNSEEN), axis=1))
    p = tl.where(there[None, :], tl.exp(x - now[:, None]), 0.0)
    shrunk = tl.exp(most - now)
    return p, shrunk, now, total * shrunk + tl.sum(p, axis=1)


@triton.jit
def row_span(
    firsts, lasts, coded_firsts, b, length, coded, first, bounded: tl.constexpr, low: tl.constexpr
):  # fmt: skip
    """What a row sees: coded slots from, dense ones from and to, counted from the view's first."""
    begin, end, own = 0, length, coded
    if bounded:
        begin = tl.maximum(tl.load(firsts + b).to(tl.int32) - first, 0)
        end = tl.minimum(tl.load(lasts + b).to(tl.int32) + 1 - first, length)
    if low:
        own = tl.minimum(tl.load(coded_firsts + b).to(tl.int32), coded)
    return own, begin, tl.maximum(begin, end)


@triton.jit(do_not_specialize=["length", "coded", "first", "heads", "group"])
def decode_parts(
    query, key, value, firsts, lasts, sinks,
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, coded_firsts,
    logits, tallies, sums, out,
    query_b, query_h, key_b, key_h, key_n, value_b, value_h, value_n,
    heads, group, length, coded, first, scaling, softcap,
    size: tl.constexpr, value_size: tl.constexpr,
    sunk: tl.constexpr, weighing: tl.constexpr, valued: tl.constexpr,
    bounded: tl.constexpr, low: tl.constexpr,
    key_bits: tl.constexpr, value_bits: tl.constexpr, key_group: tl.constexpr, value_group: tl.constexpr,
    capped: tl.constexpr, alone: tl.constexpr, width: tl.constexpr, value_width: tl.constexpr,
    row_block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """Attention of one KV head's rows to a part of their keys: sums relative to its largest logit.

    A part that is `alone` is the whole, and its output is written.
    """
    index = tl.program_id(1).to(tl.int64)
    groups = heads // group
    b, g = index // groups, index % groups
    part, parts = tl.program_id(0), tl.num_programs(0)
    r = tl.arange(0, row_block)
    real = r < group
    h = g * group + r
    row = b * heads + h
    d, e = tl.arange(0, width), tl.arange(0, value_width)
    q = tl.load(
        query + b * query_b + h[:, None] * query_h + d[None, :],
        mask=real[:, None] & (d < size)[None, :],
        other=0.0,
    )
    own, begin, end = row_span(firsts, lasts, coded_firsts, b, length, coded, first, bounded, low)
    in_codes = coded - own
    each = tl.cdiv(tl.cdiv(in_codes + end - begin, parts), key_block) * key_block
    start = part * each
    stop = tl.minimum(start + each, in_codes + end - begin)
    most = tl.full([row_block], UNSEEN, tl.float32)
    total = tl.zeros([row_block], tl.float32)
    acc = tl.zeros([row_block, value_width], tl.float32)
    if low:
        for at in range(own + start, own + tl.minimum(stop, in_codes), key_block):
            column = at + tl.arange(0, key_block)
            there = column < own + tl.minimum(stop, in_codes)
            slot = index * coded + column
            k = unpacked_tile(
                key_codes, key_scale, key_offset, slot, there, q.dtype, key_bits, key_group, size, width
            )
            line = logits + row[:, None] * (coded + length) + column[None, :]
            p, shrunk, most, total = folded_tile(
                q, k, there, line, real, most, total, scaling, softcap, capped, weighing
            )
            if valued:
                v = unpacked_tile(
                    value_codes, value_scale, value_offset, slot, there, q.dtype,
                    value_bits, value_group, value_size, value_width,
                )  # fmt: skip
                acc = acc * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
    shift = begin - in_codes
    stop += shift
    for at in range(shift + tl.maximum(start, in_codes), stop, key_block):
        column = at + tl.arange(0, key_block)
        there = column < stop
        slot = column.to(tl.int64)
        k = tl.load(
            key + b * key_b + g * key_h + slot[:, None] * key_n + d[None, :],
            mask=there[:, None] & (d < size)[None, :],
            other=0.0,
        )
        line = logits + row[:, None] * (coded + length) + coded + column[None, :]
        p, shrunk, most, total = folded_tile(
            q, k, there, line, real, most, total, scaling, softcap, capped, weighing
        )
        if valued:
            v = tl.load(
                value + b * value_b + g * value_h + slot[:, None] * value_n + e[None, :],
                mask=there[:, None] & (e < value_size)[None, :],
                other=0.0,
            )
            acc = acc * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
    if alone:
        weight, shrunk = total, tl.full([row_block], 1.0, tl.float32)
        if sunk:
            sink = tl.load(sinks + h, mask=real, other=0.0).to(tl.float32)
            highest = tl.maximum(most, sink)
            shrunk = tl.exp(most - highest)
            weight = total * shrunk + tl.exp(sink - highest)
        scale = tl.where(total > 0.0, shrunk / tl.where(total > 0.0, weight, 1.0), 0.0)
        tl.store(
            out + row[:, None] * value_size + e[None, :],
            acc * scale[:, None],
            mask=real[:, None] & (e < value_size)[None, :],
        )
    else:
        line = row * parts + part
        tl.store(tallies + line * 2, most, mask=real)
        tl.store(tallies + line * 2 + 1, total, mask=real)
        if valued:
            tl.store(
                sums + line[:, None] * value_size + e[None, :],
                acc,
                mask=real[:, None] & (e < value_size)[None, :],
            )


@triton.jit
def merged_tallies(tallies, sinks, row, h, part, parts, sunk: tl.constexpr):
    """Each part's share of a row's output, and what its logits are relative to and its weights divided by."""
    there = part < parts
    most = tl.load(tallies + (row * parts + part) * 2, mask=there, other=UNSEEN)
    total = tl.load(tallies + (row * parts + part) * 2 + 1, mask=there, other=0.0)
    highest = tl.max(most, axis=0)
    if sunk:
        sink = tl.load(sinks + h).to(tl.float32)
        highest = tl.maximum(highest, sink)
    shrunk = tl.where(total > 0.0, tl.exp(most - highest), 0.0)
    weight = tl.sum(total * shrunk, axis=0)
    if sunk:
        weight += tl.exp(sink - highest)
    weight = tl.where(weight > 0.0, weight, 1.0)
    return shrunk / weight, highest, weight


@triton.jit(do_not_specialize=["length", "coded", "first", "heads", "sets", "parts"])
def decode_merge(
    sums, tallies, sinks, logits, firsts, lasts, coded_firsts, out, scores,
    heads, sets, parts, length, coded, first,
    value_size: tl.constexpr,
    sunk: tl.constexpr, weighing: tl.constexpr, valued: tl.constexpr,
    bounded: tl.constexpr, low: tl.constexpr,
    part_block: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The output of one row from its parts; or mean weights of a set of heads, for a block of keys."""
    index = tl.program_id(1).to(tl.int64)
    job = tl.program_id(0)
    part = tl.arange(0, part_block)
    if valued and job == 0:
        e = tl.arange(0, width)
        share, _, _ = merged_tallies(tallies, sinks, index, index % heads, part, parts, sunk)
        acc = tl.load(
            sums + (index * parts + part)[:, None] * value_size + e[None, :],
            mask=(part < parts)[:, None] & (e < value_size)[None, :],
            other=0.0,
        )
        tl.store(out + index * value_size + e, tl.sum(acc * share[:, None], axis=0), mask=e < value_size)
    if weighing:
        b, own_set = index // sets, index % sets
        # there are as many programs as heads, and fewer sets
        if (job >= valued) & (b * heads < tl.num_programs(1)):
            columns = coded + length
            column = (job - valued) * block + tl.arange(0, block)
            own, begin, end = row_span(firsts, lasts, coded_firsts, b, length, coded, first, bounded, low)
            dense = column - coded
            seen = (column >= own) & (column < coded) | (dense >= begin) & (dense < end)
            weights = tl.zeros([block], tl.float32)
            members = heads // sets
            for member in range(members):
                h = own_set * members + member
                row = b * heads + h
                _, highest, weight = merged_tallies(tallies, sinks, row, h, part, parts, sunk)
                x = tl.load(logits + row * columns + column, mask=seen, other=UNSEEN)
                weights += tl.exp(x - highest) / weight
            tl.store(
                scores + index * columns + column,
                tl.where(seen, weights / members, 0.0),
                mask=column < columns,
            )
