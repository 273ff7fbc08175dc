"""The statistics of a prompt's rows in a few Triton kernels, for a whole batch; weights are never written.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
`avlprof.tracing.prompt` says row by row what these kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from avlprof.attention.column_sums import Work
from avlprof.tracing.batch import KEY_BLOCK, BatchRows
from avlprof.tracing.columns import UNSEEN
from avlprof.tracing.prompt import KINDS
from avlprof.tracing.triton_kernels import row_merge, row_sums
from avlprof.tracing.triton_sums import coverage_counts, kind_sums, received_sums

_LINES = 32  # rows that a program merges
_PROGRAMS = 528  # four for each processor of an H100
_LEAST_PART = 256  # keys
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
        # on an H100 4 warps of 64 rows take 0.6 of the time of 8, though a few registers spill; with masks or
        # the history many would
        spread = wide or call.mask is not None or plan.has_history
        self.tile = Tile(32, 8) if spread else Tile(64, 4)
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

    @property
    def splits(self) -> int:
        """Parts of the keys that have programs of their own: more where rows are few."""
        blocks: int = triton.cdiv(self.plan.rows.shape[1] * self.group, self.tile.rows)
        tiles = blocks * self.batch * self.groups
        most = max(self.length // _LEAST_PART, 1)
        return min(max(_PROGRAMS // tiles, 1), most)

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
        splits = self.splits
        partial = torch.empty((splits, *shape, 8 + bounds), dtype=torch.float32, device=device)
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
            texts = torch.full((self.batch, self.heads, rows, tokens), UNSEEN, device=device)
        grid = (triton.cdiv(count * self.group, self.tile.rows), self.batch * self.groups, splits)
        row_sums[grid](
            self.query, self.key, self.mask,
            plan.codes, plan.order, plan.uniform, plan.first,
            plan.rows, plan.bins, plan.slots, plan.text_slots,
            partial, lse if covered is None else covered, lse if texts is None else texts,
            *self.strides, batch=self.batch, count=count, slot_count=slots,
            text_count=0 if texts is None else texts.shape[2], tokens=tokens, **self.sizes,
            keys_each=triton.cdiv(triton.cdiv(self.length, KEY_BLOCK), splits) * KEY_BLOCK,
            **self.constants, measured=covered is not None, history=plan.has_history,
            bounds=bounds, bin_width=triton.next_power_of_2(bounds - 1),
            row_block=self.tile.rows, key_block=KEY_BLOCK, num_warps=self.tile.warps,
        )  # fmt: skip
        lines = lse.numel()
        row_merge[(triton.cdiv(lines, _LINES),)](
            partial, self.sinks, values, lse, lines, self.heads, count,
            splits=splits, sunk=self.call.sinks is not None, bounds=bounds,
            line_block=_LINES, width=triton.next_power_of_2(7 + bounds), num_warps=4,
        )  # fmt: skip
        return values, lse, covered, texts

    def _coverage(self, covered: Tensor, lse: Tensor) -> Tensor:
        """`[B, H, C, 2 * levels]`: tokens that hold each share, and 1 where that is known."""
        plan = self.plan
        slots, levels = plan.covered.shape[1], len(plan.shares)
        counts = covered.new_empty((self.batch, self.heads, slots, 2 * levels))
        coverage_counts[(slots, self.batch * self.heads)](
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
        kind_sums[(_KINDS, batch * heads)](
            values, kinds, sums, heads, count, columns,
            row_block=32, width=triton.next_power_of_2(columns), num_warps=4,
        )  # fmt: skip
        return sums

    def _received(self, lse: Tensor) -> Tensor:
        plan = self.plan
        kept = self.heads if self.per_head else self.groups
        sums = lse.new_empty((self.batch, kept, 3, self.length))
        grid = (triton.cdiv(self.length, KEY_BLOCK), self.batch * self.groups)
        received_sums[grid](
            self.query, self.key, self.mask, plan.codes, plan.rows, plan.got, plan.marks, lse, sums,
            *self.strides, count=plan.rows.shape[1], got_count=plan.got.shape[1], **self.sizes,
            **self.constants, every=self.every, per_head=self.per_head,
            row_block=self.received_tile.rows, key_block=KEY_BLOCK,
            num_warps=self.received_tile.warps,
        )  # fmt: skip
        return sums if self.per_head else sums.sum(dim=1, keepdim=True).div_(self.heads)
