"""Attention of a decoding step: stock, as weights and their sums, or by kernels where these are faster."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.attention.call import StepStates
from avlprof.attention.column_sums import kernels_run
from avlprof.attention.weights import packed_attention, step_weights, weighted_values

FEW_PAIRS = 32  # sequences times KV heads below which stock attention with a mask leaves a GPU idle
SHORT = 512  # keys that are read sooner than a second kernel is launched


def step_attention(states: StepStates, sets: int = 0) -> tuple[Tensor, Tensor | None]:
    """Output `[B, 1, H, E]` of a step, and its weights where some are wanted.

    Args:
        states: what it attends with.
        sets: sets of query heads whose mean weights are wanted: 0 for none, 1, or the KV heads.

    Returns:
        The output, and fp32 weights `[B, G, N]`: of the `sets`, or of all heads, whose means
        over sets `group_mean` gives either way.
    """
    if by_kernels(states, sets):
        from avlprof.attention.triton_decode import triton_decode

        out, weights = triton_decode(states, sets)
        assert out is not None
        return out, weights
    query, key, value, scaling, softcap, sinks, mask, _ = states
    assert value is not None
    if not sets:
        return packed_attention(query, key, value, scaling, mask, softcap, sinks), None
    weights = step_weights(query, key, scaling, mask, softcap, sinks)
    return weighted_values(weights, value), weights


def attention_weights(states: StepStates, sets: int) -> Tensor:
    """The weights alone, as above; values are not read."""
    if by_kernels(states, sets):
        from avlprof.attention.triton_decode import triton_decode

        weights = triton_decode(states._replace(value=None), sets)[1]
        assert weights is not None
        return weights
    query, key, _, scaling, softcap, sinks, mask, _ = states
    return step_weights(query, key, scaling, mask, softcap, sinks)


def by_kernels(states: StepStates, sets: int) -> bool:
    """Whether the kernels of `triton_decode` attend: they run there, they can, and they pay."""
    if not kernels_run(states.query) or (states.mask is not None and states.bounds is None):
        return False
    plain = states.softcap is None and states.sinks is None and not sets
    batch, kv_heads, length = states.key.shape[:3]
    return not plain or kernels_pay(batch * kv_heads, length, states.mask is not None, states.key.dtype)


def kernels_pay(pairs: int, length: int, masked: bool, dtype: torch.dtype) -> bool:
    """Whether kernels read a step's keys and values sooner than stock attention does.

    Stock attention with a mask (captured steps have one, for free slots) gives each KV head of
    a sequence to one program. On an H100 (docs/benchmarks.md, dense steps less those of `keep .2`, over
    what the bytes between them take) that is a layer's 61 us in place of 2.3 at 4 such pairs
    (Qwen2.5-VL, batch 1), and as soon as the bytes ask for from 32 pairs on: 12.5 us in place of
    12.7 at 32 (LLaVA-NeXT, batch 1), 100 of 102 at 256 (batch 8), 146 of 145 at 128 (Qwen2.5-VL,
    batch 32). Without a mask stock kernels split the keys themselves. Where weights are wanted, a soft
    cap or learned sinks, there is no stock kernel, and this is not asked.

    Args:
        pairs: sequences times KV heads.
        length: keys of the view.
        masked: whether a mask hides some of them from some rows.
        dtype: of keys and values; fp32 is what these kernels are slow at.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return masked and half and pairs < FEW_PAIRS and length >= SHORT
