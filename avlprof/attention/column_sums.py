"""How much attention every key receives from all rows together, without the N x N matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from avlprof.attention.weights import head_logits, softmax

CPU_WEIGHTS, DEVICE_WEIGHTS = 1 << 19, 1 << 23  # that exist at a time
MOST_ROWS = 256  # of a block: in longer ones many weights are above the diagonal
UNSEEN = -1e30  # logit of a key that a row may not see: finite, and its weight is 0


def kernels_run(tensor: Tensor) -> bool:
    """Whether kernels of Triton run where a tensor lies."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class Work(NamedTuple):
    """What a kernel has to do at least: bytes read and written, and operations of its products."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Seen:
    """Which keys the query rows of a batch see.

    Attributes:
        rows: int64 `[B or 1, R]` positions of the query rows, for causal attention; None: they are
            the last R positions.
        valid: bool `[B, N]`, False on padding; None: there is none.
        causal: rows see no later keys. Not read with a mask, which says all.
        mask: bool `[B or 1, 1, R, N]`, True where a row may look. `valid` is applied as well.
    """

    rows: Tensor | None = None
    valid: Tensor | None = None
    causal: bool = True
    mask: Tensor | None = None

    def positions(self, batch: int, count: int, length: int, device: torch.device) -> Tensor:
        """Positions `[B, R]` of the `count` query rows."""
        rows = torch.arange(length - count, length, device=device)[None] if self.rows is None else self.rows
        return rows.expand(batch, -1)


ALL_BEFORE = Seen()
"""Causal attention of the last positions, without padding."""


def column_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    seen: Seen = ALL_BEFORE,
    *,
    counted: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Sums over query rows of their softmax attention on each key.

    On CUDA without a mask, a kernel finds the log-sum-exp of every row and a second one, in which
    each program owns a block of keys, adds the weights up. Else weights are formed in blocks of
    rows. Both take memory linear in the number of keys.

    Args:
        query: `[B, H, R, D]` post-RoPE query rows.
        key: `[B, Hkv, N, D]` post-RoPE keys; `H` is a multiple of `Hkv`.
        scaling: factor of the dot product.
        seen: which keys the rows see.
        counted: bool `[B, R]`, rows that count; by default all.
        softcap: logit soft cap, when the model has one.
        sinks: `[H]` learned logits, as in `AttentionCall.sinks`.
        block: query rows whose weights exist at a time; by default what suits the device.

    Returns:
        fp32 `[B, H, N]`; a row that may look nowhere adds nothing.
    """
    batch, heads, count, _ = query.shape
    length = key.shape[2]
    rows = seen.positions(batch, count, length, query.device)
    if seen.mask is None and block is None and kernels_run(query):
        from avlprof.attention.triton_column_sums import triton_column_sums

        before = rows if seen.causal else None
        return triton_column_sums(query, key, scaling, before, counted, seen.valid, softcap, sinks)
    total = query.new_zeros((batch, heads, length), dtype=torch.float32)
    for index in range(batch):
        weight = torch.ones(count, device=query.device) if counted is None else counted[index].float()
        own = _RowSeen(seen, index, rows[index], weight)
        _add(total[index], query[index], key[index], scaling, own, softcap, sinks, block)
    return total


class _RowSeen:
    """Which keys the query rows of one sequence of a batch see, and how much each row counts.

    `rows [R]` are their positions, `counted` is fp32 `[R]`.
    """

    def __init__(self, seen: Seen, index: int, rows: Tensor, counted: Tensor) -> None:
        self.counted = counted
        self._rows, self._in_order = rows, seen.rows is None
        self._valid = None if seen.valid is None else seen.valid[index]
        self._causal = seen.causal and seen.mask is None
        self._mask = None if seen.mask is None else seen.mask[index if len(seen.mask) > 1 else 0, 0]

    def keys(self, block: slice, length: int) -> int:
        """Keys up to the last that a block of rows may see."""
        if not self._causal:
            return length
        if self._in_order:
            return length - len(self._rows) + int(block.stop)
        return int(self._rows[block].max().item()) + 1  # the one wait for the device, where rows were passed

    def allowed(self, block: slice, keys: int) -> Tensor | None:
        """bool `[R, keys]`, or None where all are seen."""
        mask = None if self._mask is None else self._mask[block, :keys]
        if self._causal:
            mask = torch.arange(keys, device=self._rows.device) <= self._rows[block][:, None]
        if self._valid is None:
            return mask
        return self._valid[None, :keys] if mask is None else mask & self._valid[:keys]


def _add(
    total: Tensor,
    query: Tensor,
    key: Tensor,
    scaling: float,
    seen: _RowSeen,
    softcap: float | None,
    sinks: Tensor | None,
    block: int | None,
) -> None:
    """Add the rows of one sequence, `query [H, R, D]`, to `total [H, N]`."""
    (heads, count, _), (groups, length, _) = query.shape, key.shape
    size = heads // groups
    budget = CPU_WEIGHTS if query.device.type == "cpu" else DEVICE_WEIGHTS
    most = block or min(max(budget // (length * size), 1), MOST_ROWS)
    for start in range(0, count, most):
        rows = slice(start, min(start + most, count))
        keys = seen.keys(rows, length)
        allowed = seen.allowed(rows, keys)
        weight = seen.counted[rows]
        hidden = None
        if allowed is not None:
            hidden = (~allowed).float() * UNSEEN  # adding it is several times as fast as filling by a mask
            weight = weight * allowed.any(dim=-1)
        together = max(budget // ((rows.stop - rows.start) * keys * size), 1)
        for first in range(0, groups, together):
            few = slice(first, min(first + together, groups))
            these = slice(few.start * size, few.stop * size)
            logits = head_logits(query[these, rows], key[few, :keys], scaling, softcap)
            if hidden is not None:
                logits += hidden
            own = None if sinks is None else sinks[these].view(-1, 1, 1)
            total[these, :keys] += (weight[None, None] @ softmax(logits, own))[:, 0]
