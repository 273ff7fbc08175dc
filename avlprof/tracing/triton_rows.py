"""The statistics of a prompt's rows in five Triton kernels, for a whole batch; weights are never written.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
`avlprof.tracing.prompt` says row by row what these kernels compute.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.tracing.batch import KEY_BLOCK, BatchRows
from avlprof.tracing.prompt import KINDS

UNSEEN = tl.constexpr(-1e30)  # logit of a key that a row may not see: finite, so that nothing is NaN
_KNOWN = tl.constexpr(-1e29)  # largest logits above it are of rows that see something
_SYSTEM = tl.constexpr(int(Modality.SYSTEM))
_VISION = tl.constexpr(int(Modality.VISION))
_TEXT = tl.constexpr(int(Modality.TEXT))
_GENERATED = tl.constexpr(int(Modality.GENERATED))
_PAD = tl.constexpr(int(Modality.PAD))
_FIXED = tl.constexpr(8)  # values of a row in front of its distance bins
_ONE = tl.constexpr(0x3F800000)  # bits of 1.0
_LEAST = tl.constexpr(0x33800000)  # of 2 ** -24: smaller shares of the largest weight are one size
_ROUNDING = tl.constexpr(2e-6)  # of a sum in fp32: what is missing by less is not missing
_NOTHING = tl.constexpr(1e-12)  # of a sum
_HALVINGS = 15  # of the range between them, which leaves weights apart that differ by a thousandth
_KINDS = len(KINDS) + 1  # and the last row


class PromptRows(NamedTuple):
    """What the rows of a batch attended with: `query [B, H, N, D]`, `key [B, Hkv, N, D]`, post-RoPE.

    `mask` is bool `[B or 1, H or 1, N, N]`, or None where attention was causal, or (`causal` False)
    whole. `sinks [H]` are learned logits, if there are any.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    mask: Tensor | None
    causal: bool
    sinks: Tensor | None


class RowSums(NamedTuple):
    """Sums over the rows of each prompt: `values [B, H, K, C]`, `coverage [B, H, K, 2 * levels]`
    (sums and how many rows had one), `received [B, H or 1, 3, N]`, all fp32, and `texts`, the weights
    of text rows on text `[B, H, Rt, T]`, where the history is asked for."""

    values: Tensor
    coverage: Tensor | None
    received: Tensor
    texts: Tensor | None


def triton_rows(call: PromptRows, plan: BatchRows) -> RowSums:
    """Measure the rows of a plan; half-precision inputs stay as they are, sums are fp32.

    Products of fp32 inputs are three of TF32, which is fp32's precision. Nothing waits for the device.
    """
    with torch.cuda.device(call.query.device if call.query.is_cuda else -1):
        return RowKernels(call, plan).run()


class Work(NamedTuple):
    """What a kernel has to do at least: bytes read and written, and operations of its products."""

    bytes: float
    operations: float


class Tile(NamedTuple):
    """Rows of a tile, beside `KEY_BLOCK` keys, and the warps of a program."""

    rows: int
    warps: int


class RowKernels:
    """The kernels' arguments, and their calls in order.

    Attributes:
        tile: of the rows' kernel.
        received_tile: of the kernel of received sums.
        coverage_warps: of a program that measures one row's coverage.
    """

    def __init__(self, call: PromptRows, plan: BatchRows) -> None:
        query, key = call.query, call.key
        # the kernels step through the last dimension one by one
        self.query = query if query.stride(-1) == 1 else query.contiguous()
        self.key = key if key.stride(-1) == 1 else key.contiguous()
        self.call, self.plan = call, plan
        self.per_head, self.every = plan.options.per_head, plan.options.rows == "all"
        self.batch, self.heads, self.length, self.size = query.shape
        self.groups = key.shape[1]
        self.group = self.heads // self.groups
        self.width = max(triton.next_power_of_2(self.size), 16)
        wide = self.width * query.element_size() > 256
        # on an H100 of 3,072 tokens: 4 warps of 64 rows take 0.6 times what 8 do, spilled registers included
        self.tile = Tile(32, 8) if wide else Tile(64, 4)
        self.received_tile = Tile(32, 4) if wide or (self.every and self.group == 1) else Tile(64, 8)
        self.span = max(triton.next_power_of_2(plan.span), 16)
        self.coverage_warps = min(max(self.span // 1024, 1), 16)
        mask = call.mask
        steps = (0, 0, 0, 0) if mask is None else mask.expand(self.batch, self.heads, -1, -1).stride()
        self.mask = plan.codes if mask is None else mask.view(torch.uint8)
        self.sinks = plan.codes if call.sinks is None else call.sinks
        self.strides = (*self.query.stride()[:3], *self.key.stride()[:3], *steps)
        self.sizes: dict[str, Any] = {
            "heads": self.heads,
            "group": self.group,
            "length": self.length,
            "size": self.size,
            "scaling": call.scaling,
            "softcap": call.softcap or 1.0,
        }
        self.constants: dict[str, Any] = {
            "causal": call.causal and mask is None,
            "masked": mask is not None,
            "capped": call.softcap is not None,
            "width": self.width,
        }

    def run(self) -> RowSums:
        plan = self.plan
        values, lse, covered, texts = self._rows()
        coverage = None
        if covered is not None:
            coverage = self._kinds(self._coverage(covered, lse), plan.covered_kinds)
        if texts is not None:
            base = torch.gather(lse, 2, plan.text_rows.long()[:, None].expand(-1, self.heads, -1))
            texts = (texts - base[..., None]).exp_()
        return RowSums(self._kinds(values, plan.kinds), coverage, self._received(lse), texts)

    def parts(self) -> Iterator[tuple[str, Callable[[], object], Work]]:
        """Each kernel alone: its name, how to run it, and what it has to do."""
        plan, heads, rows = self.plan, self.heads, self.plan.rows
        item = self.query.element_size() * self.size
        keys = self.batch * self.groups * self.length * item
        values, lse, covered, texts = self._rows()
        written = sum(4 * part.numel() for part in (values, lse, covered, texts) if part is not None)
        pairs = float(((rows + 1) if self.constants["causal"] else (rows >= 0) * self.length).sum())
        products = 2 * pairs * heads * self.size
        yield "rows", self._rows, Work(keys + rows.numel() * heads * item + written, products)
        if covered is not None:
            found = 4.0 * plan.covered.numel() * heads * plan.span
            yield "coverage", partial(self._coverage, covered, lse), Work(found, 0)
        yield "sums of kinds", partial(self._kinds, values, plan.kinds), Work(4.0 * values.numel(), 0)
        share = plan.got.numel() / rows.numel()
        sums = 12 * self.batch * self.groups * self.length
        queries = plan.got.numel() * heads * item
        yield "received", partial(self._received, lse), Work(keys + queries + sums, products * share)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        plan, device = self.plan, self.query.device
        count, bounds = plan.bins.shape[1:]
        shape = (self.batch, self.heads, count)
        values = torch.empty((*shape, 7 + bounds), dtype=torch.float32, device=device)
        lse = torch.empty(shape, dtype=torch.float32, device=device)
        slots, tokens = plan.covered.shape[1], plan.text
        covered = texts = None
        if plan.is_covered:
            covered = torch.empty(
                (self.batch, self.heads, slots, self.length), dtype=torch.float32, device=device
            )
        if plan.has_history:
            rows = plan.text_rows.shape[1]
            texts = torch.full((self.batch, self.heads, rows, tokens), -1e30, device=device)
        grid = (triton.cdiv(count * self.group, self.tile.rows), self.batch * self.groups)
        _row_values[grid](
            self.query, self.key, self.mask, self.sinks,
            plan.codes, plan.order, plan.uniform, plan.first,
            plan.rows, plan.bins, plan.slots, plan.text_slots,
            values, lse, lse if covered is None else covered, lse if texts is None else texts,
            *self.strides, count=count, slot_count=slots,
            text_count=0 if texts is None else texts.shape[2], tokens=tokens, **self.sizes,
            **self.constants, sunk=self.call.sinks is not None, measured=covered is not None,
            history=plan.has_history, bounds=bounds, bin_width=triton.next_power_of_2(bounds - 1),
            row_block=self.tile.rows, key_block=KEY_BLOCK, num_warps=self.tile.warps,
        )  # fmt: skip
        return values, lse, covered, texts

    def _coverage(self, covered: Tensor, lse: Tensor) -> Tensor:
        """`[B, H, C, 2 * levels]`: tokens that hold each share, and 1 where that is known."""
        plan = self.plan
        slots, levels = plan.covered.shape[1], len(plan.shares)
        counts = covered.new_empty((self.batch, self.heads, slots, 2 * levels))
        _coverage_counts[(slots, self.batch * self.heads)](
            covered, plan.codes, lse, plan.rows, plan.covered, plan.vision, plan.shares, counts,
            self.heads, plan.bins.shape[1], slots, self.length,
            causal=self.constants["causal"], levels=levels, span=self.span, halvings=_HALVINGS,
            num_warps=self.coverage_warps,
        )  # fmt: skip
        return counts

    def _kinds(self, values: Tensor, kinds: Tensor) -> Tensor:
        """Sums `[B, H, K, C]` of `values [B, H, R, C]` over the rows of each kind."""
        batch, heads, count, columns = values.shape
        sums = values.new_empty((batch, heads, _KINDS, columns))
        _kind_sums[(_KINDS, batch * heads)](
            values, kinds, sums, heads, count, columns,
            row_block=32, width=triton.next_power_of_2(columns), num_warps=4,
        )  # fmt: skip
        return sums

    def _received(self, lse: Tensor) -> Tensor:
        plan = self.plan
        kept = self.heads if self.per_head else self.groups
        sums = lse.new_empty((self.batch, kept, 3, self.length))
        grid = (triton.cdiv(self.length, KEY_BLOCK), self.batch * self.groups)
        _received_sums[grid](
            self.query, self.key, self.mask, plan.codes, plan.rows, plan.got, plan.marks, lse, sums,
            *self.strides, count=plan.rows.shape[1], got_count=plan.got.shape[1], **self.sizes,
            **self.constants, every=self.every, per_head=self.per_head,
            row_block=self.received_tile.rows, key_block=KEY_BLOCK,
            num_warps=self.received_tile.warps,
        )  # fmt: skip
        return sums if self.per_head else sums.sum(dim=1, keepdim=True).div_(self.heads)


@triton.jit
def _tile(
    q, k, row_seen, at, h, column, code, mask, b, mask_b, mask_h, mask_r, mask_n, length,
    scaling, softcap, causal: tl.constexpr, masked: tl.constexpr, capped: tl.constexpr,
):  # fmt: skip
    """fp32 logits `[rows, keys]`, `UNSEEN` where a row may not look."""
    x = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scaling
    if capped:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # tanh
    seen = row_seen[:, None] & (code != _PAD)[None, :]
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
def _row_values(
    query, key, mask, sinks,
    codes, order, uniform, first, rows, bins, slots, text_slots,
    out, lse, covered, texts,
    query_b, query_h, query_n, key_b, key_h, key_n, mask_b, mask_h, mask_r, mask_n,
    count, slot_count, text_count, tokens, heads, group, length, size, scaling, softcap,
    causal: tl.constexpr, masked: tl.constexpr, capped: tl.constexpr, width: tl.constexpr,
    sunk: tl.constexpr, measured: tl.constexpr, history: tl.constexpr,
    bounds: tl.constexpr, bin_width: tl.constexpr, row_block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """Values of a block of rows, in one pass over the keys; heads of a group are rows of one tile.

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
    for start in range(first_key // key_block * key_block, last, key_block):
        column = start + tl.arange(0, key_block)
        k = tl.load(
            key + b * key_b + g * key_h + column.to(tl.int64)[:, None] * key_n + d[None, :],
            mask=(column < length)[:, None] & (d < size)[None, :],
            other=0.0,
        )
        code = tl.load(codes + b * length + column, mask=column < length, other=_PAD)
        x = _tile(
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
            vision += tl.where(only == _VISION, gained, 0.0)
            text += tl.where(only == _TEXT, gained, 0.0)
            generated += tl.where(only == _GENERATED, gained, 0.0)
        else:
            system += tl.sum(tl.where((code == _SYSTEM)[None, :], p, 0.0), axis=1)
            vision += tl.sum(tl.where((code == _VISION)[None, :], p, 0.0), axis=1)
            text += tl.sum(tl.where((code == _TEXT)[None, :], p, 0.0), axis=1)
            generated += tl.sum(tl.where((code == _GENERATED)[None, :], p, 0.0), axis=1)
        if start <= first_key:
            sink += tl.sum(tl.where((column == first_key)[None, :], p, 0.0), axis=1)
        if only != _SYSTEM and only != _VISION:
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
    known = largest > _KNOWN
    most, weight, learned = largest, total, tl.zeros([row_block], tl.float32)
    shrunk = tl.full([row_block], 1.0, tl.float32)
    if sunk:
        own = tl.load(sinks + h, mask=real, other=0.0).to(tl.float32)
        most = tl.maximum(largest, own)
        shrunk = tl.exp(largest - most)
        weight = total * shrunk + tl.exp(own - most)
    scale = tl.where(known, shrunk / tl.where(known, weight, 1.0), 0.0)
    if sunk:
        learned = tl.where(known, tl.maximum(1.0 - total * scale, 0.0), 0.0)
    above = most - largest + tl.log(tl.where(known, weight, 1.0))  # log-sum-exp less the largest logit
    entropy = tl.where(known, above * total * scale - spread * scale, 0.0)
    line = (b * heads + h) * count + r
    tl.store(lse + line, tl.where(known, largest + above, float("inf")), mask=r < count)
    values = out + line * (_FIXED + bounds - 1)
    tl.store(values, system * scale, mask=r < count)
    tl.store(values + 1, vision * scale, mask=r < count)
    tl.store(values + 2, text * scale, mask=r < count)
    tl.store(values + 3, generated * scale, mask=r < count)
    tl.store(values + 4, sink * scale, mask=r < count)
    tl.store(values + 5, learned, mask=r < count)
    tl.store(values + 6, entropy, mask=r < count)
    tl.store(values + 7, text_sink * scale, mask=r < count)
    tl.store(
        values[:, None] + _FIXED + bin_index[None, :],
        distance * scale[:, None],
        mask=(r < count)[:, None] & (bin_index < bounds - 1)[None, :],
    )


@triton.jit
def _coverage_counts(
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
    code = tl.load(codes + b * length + column, mask=column < length, other=_PAD)
    reach = at
    if not causal:
        reach = tl.where(at >= 0, length, -1)
    seen = (code == _VISION) & (column <= reach)
    x = tl.load(covered + (index * slot_count + slot) * length + column, mask=seen, other=UNSEEN)
    largest = tl.max(x, axis=0)
    normal = tl.load(lse + index * count + there)
    known = (largest > _KNOWN) & (tl.exp(largest - normal) > 0.0)
    weight = tl.where(x > _KNOWN, tl.exp(x - largest), 0.0)
    bits = weight.to(tl.int32, bitcast=True)
    total = tl.sum(weight, axis=0)
    every = tl.sum((x > _KNOWN).to(tl.float32), axis=0)
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
def _kind_sums(
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
def _received_sums(
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
    code = tl.load(codes + b * length + column, mask=column < length, other=_PAD)
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
                x = _tile(
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
