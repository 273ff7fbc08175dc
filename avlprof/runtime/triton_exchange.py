"""The core picked anew on the device: what changes is found and counted there, and nothing else is moved.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _PAIRS = 2048, 16  # that a program takes at a time
_WARPS = 8  # of a program that chooses

_DIGITS = tl.constexpr(256)  # of eight bits


def triton_refresh(
    buffers: tuple[Tensor, Tensor, Tensor], scores: Tensor, start: int, edges: Tensor, most: int
) -> None:
    """Make the best-scored vision slots of each row its core, in two launches, in place.

    The first chooses and lists each row's leaving and entering slots, the second exchanges them in all
    buffers; programs whose pairs do not exist return at once, so that the bytes moved are those of
    what changes. Nothing waits for the device, and the launches are the same whatever changes, so that they
    can be captured. What is chosen is what `best_slots` chooses: of equal scores the lower position.

    Args:
        buffers: keys `[B, H, C, D]`, values `[B, H, C, E]` and positions int64 `[B, 1 or H, C]`, below
            2^31; the last dimensions are contiguous.
        scores: fp32 `[B, G, n]` of the slots from `start` on; `G` is 1 or `H`, and no more than there are
            rows of positions.
        edges: `[B, 3]` on the device: the slots where each row's vision and its core begin, and where both
            end.
        most: a bound of the exchanges of a row, known ahead.
    """
    keys, values, positions = buffers
    batch, heads, _, size = keys.shape
    groups = scores.shape[1]
    if most == 0:
        return
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    pairs = torch.empty((batch * groups, 2, most), dtype=torch.int32, device=keys.device)
    counts = torch.empty(batch * groups, dtype=torch.int32, device=keys.device)
    with torch.cuda.device(keys.device if keys.is_cuda else -1):
        core_choice[(batch * groups,)](
            scores, positions, edges, pairs, counts,
            *scores.stride()[:2], *positions.stride()[:2],
            groups, start, most, block=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
        exchange_pairs[(triton.cdiv(most, _PAIRS), batch * heads)](
            keys, values, positions, pairs, counts,
            *keys.stride()[:3], *values.stride()[:3], *positions.stride()[:2],
            heads, groups, positions.shape[1], most, size, values.shape[3],
            block=_PAIRS, width=triton.next_power_of_2(max(size, values.shape[3])),
        )  # fmt: skip


@triton.jit
def image_of(score):
    """Integers in the order of floats, -0 being 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def digit_of_largest(bins, need):
    """The digit of the `need`-th largest of what `bins` count, and how many are above it and have it."""
    digit = tl.arange(0, _DIGITS)
    reach = tl.sum(bins, axis=0) - tl.cumsum(bins, axis=0) + bins  # that have this digit or a larger one
    found = tl.sum((reach >= need).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(digit > found, bins, 0), axis=0)
    return found, above, tl.sum(tl.where(digit == found, bins, 0), axis=0)


@triton.jit
def worst_of_best(
    score, place, kinds, low, high, wanted, kind: tl.constexpr, placed: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """What the worst of the `wanted` best has, of columns `low` to `high`: its score's image and its place.

    A column is taken if its image is larger, or equal and its place not above. Eight bits are found at a
    time, by counting. `kind`: only columns of this kind compete; not `placed`: places are the columns.
    """
    least, need, tied = 0, wanted, 0
    for level in range(4):
        bins = tl.zeros([_DIGITS], tl.int32)
        for at in range(low, high, block):
            column = at + tl.arange(0, block)
            own = column < high
            digits = image_of(tl.load(score + column, mask=own, other=0.0)) ^ -0x80000000
            if kind is not None:
                own = own & (tl.load(kinds + column, mask=own, other=kind - 1) == kind)
            digits = digits >> (24 - 8 * level)
            own = own & (((digits >> 8) & ((1 << (8 * level)) - 1)) == least)
            bins += tl.histogram(digits & 255, _DIGITS, mask=own)
        digit, above, tied = digit_of_largest(bins, need)
        least = (least << 8) | digit
        need -= above
    least = least ^ -0x80000000
    last = 0x7FFFFFFF
    if (need < tied) & (wanted > 0):
        # places are ranked from the lowest on, which is from the largest of what they leave
        far = 0
        for level in range(4):
            bins = tl.zeros([_DIGITS], tl.int32)
            for at in range(low, high, block):
                column = at + tl.arange(0, block)
                own = column < high
                image = image_of(tl.load(score + column, mask=own, other=0.0))
                mirror = 0x7FFFFFFF - column
                if placed:
                    mirror = 0x7FFFFFFF - tl.load(place + column, mask=own, other=0).to(tl.int32)
                own = own & (image == least)
                if kind is not None:
                    own = own & (tl.load(kinds + column, mask=column < high, other=kind - 1) == kind)
                mirror = mirror >> (24 - 8 * level)
                bins += tl.histogram(mirror & 255, _DIGITS, mask=own & ((mirror >> 8) == far))
            digit, above, tied = digit_of_largest(bins, need)
            far = (far << 8) | digit
            need -= above
        last = 0x7FFFFFFF - far
    return least, last


@triton.jit(do_not_specialize=["start", "most", "groups"])
def core_choice(
    scores, positions, edges, pairs, counts,
    score_b, score_g, position_b, position_g, groups, start, most, block: tl.constexpr,
):  # fmt: skip
    """The best slots of one row's set: those that leave its core for them, and those that enter, in order."""
    index = tl.program_id(0).to(tl.int64)
    b, g = index // groups, index % groups
    low = tl.load(edges + b * 3).to(tl.int32)
    core = tl.load(edges + b * 3 + 1).to(tl.int32)
    high = tl.load(edges + b * 3 + 2).to(tl.int32)
    score = scores + b * score_b + g * score_g - start
    place = positions + b * position_b + g * position_g
    least, last = worst_of_best(score, place, edges, low, high, high - core, None, True, block)
    leaves, enters = 0, 0
    line = pairs + index * 2 * most
    for at in range(low, high, block):
        slot = at + tl.arange(0, block)
        image = image_of(tl.load(score + slot, mask=slot < high, other=0.0))
        position = tl.load(place + slot, mask=slot < high, other=0)
        will = (image > least) | ((image == least) & (position <= last))
        will = will & (slot < high) & (high > core)
        was = (slot >= core) & (slot < high)
        leaving, entering = (was & (will == 0)).to(tl.int32), (will & (was == 0)).to(tl.int32)
        first = leaves + tl.cumsum(leaving, axis=0) - 1
        second = enters + tl.cumsum(entering, axis=0) - 1
        tl.store(line + first, slot, mask=(leaving != 0) & (first < most))
        tl.store(line + most + second, slot, mask=(entering != 0) & (second < most))
        leaves += tl.sum(leaving, axis=0)
        enters += tl.sum(entering, axis=0)
    tl.store(counts + index, tl.minimum(tl.minimum(leaves, enters), most))


@triton.jit
def exchange_pairs(
    keys, values, positions, pairs, counts,
    key_b, key_h, key_n, value_b, value_h, value_n, position_b, position_h,
    heads, groups, position_heads, most, key_size, value_size,
    block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Exchange some pairs of slots of one head of one row."""
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    own = b * groups + tl.where(groups > 1, h, 0)
    count = tl.load(counts + own)
    begin = tl.program_id(0) * block
    if begin < count:
        pair = begin + tl.arange(0, block)
        there = pair < count
        d = tl.arange(0, width)
        first = tl.load(pairs + own * 2 * most + pair, mask=there, other=0).to(tl.int64)
        second = tl.load(pairs + own * 2 * most + most + pair, mask=there, other=0).to(tl.int64)
        line = keys + b * key_b + h * key_h + d[None, :]
        mask = there[:, None] & (d < key_size)[None, :]
        x = tl.load(line + first[:, None] * key_n, mask=mask)
        y = tl.load(line + second[:, None] * key_n, mask=mask)
        tl.store(line + first[:, None] * key_n, y, mask=mask)
        tl.store(line + second[:, None] * key_n, x, mask=mask)
        line = values + b * value_b + h * value_h + d[None, :]
        mask = there[:, None] & (d < value_size)[None, :]
        x = tl.load(line + first[:, None] * value_n, mask=mask)
        y = tl.load(line + second[:, None] * value_n, mask=mask)
        tl.store(line + first[:, None] * value_n, y, mask=mask)
        tl.store(line + second[:, None] * value_n, x, mask=mask)
        if h < position_heads:
            row = positions + b * position_b + h * position_h
            a = tl.load(row + first, mask=there)
            c = tl.load(row + second, mask=there)
            tl.store(row + first, c, mask=there)
            tl.store(row + second, a, mask=there)
