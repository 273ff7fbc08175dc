"""Prompts of a whole batch measured by kernels, where a device has them; `prompt` says what they compute."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.attention.column_sums import kernels_run
from avlprof.tracing.batch import BatchRows
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.prompt import PromptSums
from avlprof.tracing.statistics import history
from avlprof.tracing.sums import Sums

MOST_HEAD_DIM = 256


def serves(call: AttentionCall, options: RecordOptions) -> bool:
    """Whether kernels measure a prompt's rows: on CUDA with Triton, where no block is set and rows add up."""
    return (
        options.block is None
        and not options.text_rows
        and call.positions is None
        and call.key.shape[2] == call.query.shape[2]
        and call.query.shape[-1] <= MOST_HEAD_DIM
        and kernels_run(call.query)
    )


def measure_batch(call: AttentionCall, plan: BatchRows) -> Iterator[PromptSums]:
    """Sums of each prompt of a batch, in order; all rows and heads are measured together.

    Args:
        call: a layer's, of the prompts alone: `query [B, H, N, D]`, `key [B, Hkv, N, D]`, on CUDA or in
            Triton's interpreter.
        plan: the rows that are measured, on the call's device.

    Yields:
        what `prompt.measure_prompt` gives for each row of the batch, in fp32, with `received` of all N
        columns and `columns` telling which are vision's. Nothing waits for the device.
    """
    from avlprof.tracing.triton_rows import PromptRows, triton_rows

    causal = bool(getattr(call.module, "is_causal", True))
    rows = PromptRows(call.query, call.key, call.scaling, call.softcap, call.mask, causal, call.sinks)
    sums = triton_rows(rows, plan)
    for index, own in enumerate(plan.plans):
        kinds = Sums(own.kinds)
        count = len(own.kinds)
        kinds.values = sums.values[index, :, :count]
        kinds.coverage = None if sums.coverage is None else sums.coverage[index, :, :count]
        past = None
        if own.options.history is not None:
            past = _history(plan, index, sums.texts, sums.received.shape[1])
        yield PromptSums(kinds, sums.received[index], past, plan.pictured[index])


def _history(plan: BatchRows, index: int, texts: Tensor | None, heads: int) -> Tensor:
    """A-VL's history scores fp64 `[H or 1, T]` of one prompt's text tokens."""
    own = plan.plans[index]
    tokens, rows, kept = len(own.columns.text), own.kinds.get("text", 0), own.options.history
    assert kept is not None
    if texts is None or not rows:
        return torch.zeros(heads, tokens, dtype=torch.float64, device=plan.codes.device)
    scores = history(texts[index, :, :rows, :tokens], plan.text_order[index, :rows], kept, decoding=False)
    return scores if own.options.per_head else scores.mean(dim=0, keepdim=True)
