"""One layer's prompt, measured: the wanted rows against all keys, a block of weights at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.attention.rows import head_logits
from avlprof.tracing import statistics
from avlprof.tracing.history import history
from avlprof.tracing.measure import UNSEEN, row_values
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.plan import MOST_ROWS, RECEIVED, Block, RowPlan
from avlprof.tracing.sums import Sums

CPU_BLOCK = 1 << 19  # weights that stay in a core's cache
DEVICE_BLOCK = 1 << 22  # and few launches


@dataclass(frozen=True)
class PromptAttention:
    """What one row of a batch attended with, padding left out.

    `query [H, N, D]` and `key [Hkv, N, D]` are post-RoPE; `mask` is bool `[N, N]`, or None where
    attention was causal, or (`causal` False) whole.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    mask: Tensor | None
    causal: bool


@dataclass
class PromptFound:
    """Sums over the rows: `received` fp32 `[H, 3, V]`, what each vision token got from `RECEIVED`;
    `history` fp64 `[H, T]`, where it was asked for. Without `per_head` H is 1, the mean over heads."""

    sums: Sums
    received: Tensor
    history: Tensor | None


def measure_prompt(attention: PromptAttention, plan: RowPlan) -> PromptFound:
    """Measure the rows of a plan in one pass.

    Weights exist for some rows of some KV groups at a time, and for the keys that these rows may
    see. Nothing here waits for a device.
    """
    heads, length, _ = attention.query.shape
    groups = len(attention.key)
    size, device = heads // groups, attention.key.device
    budget = plan.options.block or (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK)
    kept = heads if plan.options.per_head else 1
    shape = (kept, len(RECEIVED), len(plan.columns.vision))
    found = PromptFound(Sums(plan.kinds), torch.zeros(shape, dtype=torch.float32, device=device), None)
    if plan.options.history is not None:
        found.history = torch.zeros(kept, len(plan.columns.text), dtype=torch.float64, device=device)
    for block in plan.blocks(min(max(budget // (length * size), 1), MOST_ROWS)):
        seen = block.last + 1 if attention.mask is None and attention.causal else length
        together = max(budget // (len(block.rows) * seen * size), 1)
        for start in range(0, groups, together):
            _measure(found, attention, plan, block, seen, slice(start, min(start + together, groups)))
    if not plan.options.per_head:
        found.received /= heads
        if found.history is not None:
            found.history /= heads
    return found


def _measure(
    found: PromptFound, attention: PromptAttention, plan: RowPlan, block: Block, seen: int, groups: slice
) -> None:
    """Add one block of rows and one slice of KV groups."""
    total, size = len(attention.query), len(attention.query) // len(attention.key)
    heads = slice(groups.start * size, groups.stop * size)
    options, columns = plan.options, plan.columns
    logits = head_logits(
        attention.query[heads, block.rows],
        attention.key[groups, :seen],
        attention.scaling,
        attention.softcap,
    )
    blind = None
    if attention.mask is not None:
        allowed = attention.mask[block.rows]
        logits += (~allowed).float() * UNSEEN  # several times as fast as filling by a mask
        blind = ~allowed.any(dim=-1)
    elif attention.causal:
        logits[..., block.first + 1 :] += block.later
    weights = logits.softmax(dim=-1)
    values, text = row_values(logits, weights, columns, block.bins)
    if blind is not None:
        weights.masked_fill_(blind[:, None], 0.0)
        values.masked_fill_(blind[:, None], 0.0)
    found.sums.add(values, block.kinds, heads, total)
    visible = len(columns.vision) and (attention.mask is not None or seen > columns.vision.places[0])
    if visible and len(block.covered):
        vision = columns.vision.of_first(weights[:, block.covered])
        counts = statistics.coverage(statistics.descending(vision), columns.shares)
        found.sums.add_coverage(counts, block.covered_kinds, heads, total)
    where = heads if options.per_head else slice(0, 1)
    if block.is_received:
        gained = columns.vision.of_first(_kept(block.received @ weights, options))
        found.received[where, :, : gained.shape[-1]] += gained
    if found.history is not None and options.history is not None and len(block.is_text):
        rows = block.is_text
        scores = history(text[:, rows], block.order[rows], options.history, decoding=False)
        added = _kept(scores, options)
        found.history[where, : added.shape[-1]] += added


def _kept(values: Tensor, options: RecordOptions) -> Tensor:
    """Values `[h, ...]` of some heads as they are added up: one by one, or `[1, ...]` together."""
    return values if options.per_head else values.sum(dim=0, keepdim=True)
