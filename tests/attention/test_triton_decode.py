"""The kernels of a decoding step against attention in fp64, one row and one head at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from avlprof.attention.call import Bounds, StepStates
from avlprof.attention.decode import FEW_PAIRS, SHORT, kernels_pay
from tests.interpreted import DEVICE, passes, runs_elsewhere, runs_here

HALF = torch.float16  # the interpreter cannot multiply bf16
CASES = {
    "one row": {"group": 1, "size": 64},
    "one part": {"batch": 2, "kv_heads": 2, "group": 3, "size": 32, "ragged": True, "parts": 1},
    "groups of 4": {"kv_heads": 2, "group": 4, "size": 80, "dtype": HALF, "sets": 2},
    "groups of 7": {"batch": 2, "group": 7, "size": 128, "dtype": HALF, "ragged": True, "sets": 1},
    "groups of 8": {"group": 8, "size": 96, "sinks": True, "ragged": True},
    "soft cap": {"batch": 2, "kv_heads": 2, "group": 2, "softcap": 1.5, "sets": 4, "parts": 5},
    "sinks": {"batch": 2, "kv_heads": 2, "group": 3, "sinks": True, "sets": 6, "ragged": True},
    "sinks in one part": {"batch": 2, "kv_heads": 2, "sinks": True, "softcap": 4.0, "parts": 1},
    "other values": {"batch": 2, "size": 32, "value_size": 80, "ragged": True, "parts": 2},
    "no values": {"batch": 2, "kv_heads": 2, "group": 2, "sets": 2, "ragged": True, "value_size": 0},
    "nothing seen": {"batch": 2, "sets": 1, "blind": True},
    "nothing seen but sinks": {"batch": 2, "sets": 1, "blind": True, "sinks": True, "parts": 1},
    "one key": {"batch": 2, "length": 1, "sets": 1},
    "many parts": {"batch": 3, "length": 200, "parts": 13, "ragged": True, "group": 2},
    "8 bits": {"kv_heads": 2, "group": 2, "size": 64, "coded": 40, "bits": (8, 8), "sets": 2, "parts": 3},
    "4 bits": {"batch": 2, "size": 64, "coded": 70, "bits": (4, 4), "ragged": True, "parts": 3},
    "8 and 4 bits": {"batch": 2, "size": 96, "coded": 33, "bits": (8, 4), "ragged": True, "parts": 1},
    "2 bits": {"batch": 2, "kv_heads": 2, "size": 32, "coded": 50, "bits": (2, 2), "ragged": True, "sets": 1},
    "4 bits, groups of 20": {"size": 80, "coded": 33, "bits": (4, 8), "scales": 4, "sets": 1, "dtype": HALF},
}


class Few(NamedTuple):
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    bits: int


class Low(NamedTuple):
    key: Few
    value: Few
    firsts: torch.Tensor


def coded(shape, bits, scales, generator):
    """Random codes, and the numbers that they stand for."""
    numbers = torch.randint(0, 1 << bits, shape, generator=generator)
    scale = (torch.rand(*shape[:-1], scales, generator=generator) / (1 << bits)).to(HALF)
    offset = torch.randn(*shape[:-1], scales, generator=generator).to(HALF)
    each = shape[-1] // scales
    real = numbers * scale.double().repeat_interleave(each, -1) + offset.double().repeat_interleave(each, -1)
    codes = sum(numbers[..., at :: 8 // bits] << (bits * at) for at in range(8 // bits))
    return Few(codes.to(torch.uint8).to(DEVICE), scale.to(DEVICE), offset.to(DEVICE), bits), real


def attended(query, keys, values, scaling, softcap, sink):
    """Output and weights of one head's row, in fp64."""
    logits = (keys.double() @ query.double()) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    sums = logits.exp().sum() + (0.0 if sink is None else sink.double().exp())
    weights = logits.exp() / sums
    return weights @ values.double(), weights


JOINED = {
    "one row": {"batch": 1, "kv_heads": 2, "group": 3, "size": 32, "lengths": [40, 7]},
    "a head without keys": {"kv_heads": 2, "group": 1, "size": 64, "lengths": [33, 0, 1, 80]},
    "sinks and halves": {"kv_heads": 2, "group": 2, "size": 32, "lengths": [5, 50, 21, 9], "sinks": True},
}
"""Rows with lengths of their own for each KV head: beside the keys that all heads of a row have."""


@pytest.mark.full
@runs_elsewhere
def test_the_kernels_in_the_interpreter():
    passes(__file__, len(CASES) + len(JOINED), "-k", "kernels_attend or heads_of_their_own")


@runs_here
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_attend_as_fp64_does(name, monkeypatch):
    from avlprof.attention import triton_decode

    case = {"batch": 1, "kv_heads": 1, "group": 1, "size": 16, "length": 90, "sets": 0, "parts": 4} | CASES[
        name
    ]
    batch, groups, size, length, sets = (case[k] for k in ("batch", "kv_heads", "size", "length", "sets"))
    heads, dtype, width = (
        groups * case["group"],
        case.get("dtype", torch.float32),
        case.get("value_size", size),
    )
    generator = torch.Generator().manual_seed(length + heads)
    monkeypatch.setattr(triton_decode, "_PROGRAMS", case["parts"] * batch * groups)
    monkeypatch.setattr(triton_decode, "_LEAST_PART", 16)
    # views into larger buffers: the step's begin at slot 3
    query = torch.randn(batch, heads, 1, size, generator=generator).to(dtype)
    buffers = [
        torch.randn(batch, groups, length + 8, n, generator=generator).to(dtype) for n in (size, width)
    ]
    keys, values = (buffer[:, :, 3 : 3 + length] for buffer in buffers)
    sinks = torch.randn(heads, generator=generator).to(dtype) if case.get("sinks") else None
    spans = [(0, length)] * batch
    if case.get("ragged"):
        spans = [(7 * row, length - 11 * (batch - 1 - row)) for row in range(batch)]
    if case.get("blind"):
        spans[0] = (5, 5)
    bounds = None
    if spans != [(0, length)] * batch or name == "soft cap":  # lasts beyond the view are cut off
        firsts, lasts = torch.tensor(spans).unbind(1)
        over = 4 if name == "soft cap" else 0
        bounds = Bounds((firsts + 3).to(DEVICE), (lasts + 2 + over).to(DEVICE), 3)
    low, before = None, 0
    if "coded" in case:
        before, scales = case["coded"], case.get("scales", size // 32)
        shape = (batch, groups, before, size)
        (key, low_keys), (value, low_values) = (coded(shape, b, scales, generator) for b in case["bits"])
        low_firsts = torch.tensor([9 * row if case.get("ragged") else 0 for row in range(batch)])
        low = Low(key, value, low_firsts.to(DEVICE))
    scaling, softcap = size**-0.5, case.get("softcap")
    there = [None if t is None else t.to(DEVICE) for t in (query, *buffers, sinks)]
    states = StepStates(
        there[0],
        there[1][:, :, 3 : 3 + length],
        there[2][:, :, 3 : 3 + length] if width else None,
        scaling,
        softcap,
        there[3],
        None,
        bounds,
    )
    assert triton_decode.DecodeKernels(states, sets, low).parts == case["parts"] or length == 1
    out, weights = triton_decode.triton_decode(states, sets, low)
    assert (out is None) == (width == 0)
    assert (weights is None) == (sets == 0)
    close = 3e-3 if dtype is HALF else 2e-5
    for row, (start, end) in enumerate(spans):
        each = torch.zeros(heads, before + length, dtype=torch.float64)
        for head in range(heads):
            own = head // case["group"]
            seen = [t[row, own, start:end].double() for t in (keys, values)]
            if low is not None:
                far = int(low_firsts[row])
                seen = [
                    torch.cat([t[row, own, far:], s])
                    for t, s in zip((low_keys, low_values), seen, strict=True)
                ]
            sink = None if sinks is None else sinks[head]
            wanted, given = attended(query[row, head, 0], *seen, scaling, softcap, sink)
            if out is not None:
                torch.testing.assert_close(out[row, 0, head].double().cpu(), wanted, atol=close, rtol=close)
            if low is not None:
                each[head, far:before] = given[: before - far]
            each[head, before + start : before + end] = given[len(given) - (end - start) :]
        if weights is not None:
            means = each.view(sets, heads // sets, -1).mean(dim=1)
            torch.testing.assert_close(weights[row].double().cpu(), means, atol=close, rtol=close)


def test_kernels_pay_where_stock_attention_leaves_a_gpu_idle():
    """Qwen2.5-VL at batch 1 and 4; not LLaVA-NeXT, short views, none masked, nor fp32."""
    half = torch.bfloat16
    assert kernels_pay(4, 4096, True, half)
    assert kernels_pay(16, SHORT, True, half)
    assert not kernels_pay(FEW_PAIRS, 4096, True, half)
    assert not kernels_pay(4, SHORT - 1, True, half)
    assert not kernels_pay(4, 4096, False, half)
    assert not kernels_pay(4, 4096, True, torch.float32)


@runs_here
@pytest.mark.parametrize("name", JOINED)
def test_heads_of_their_own_lengths_attend_as_fp64_does(name, monkeypatch):
    """Under one softmax with the keys of the row, by way of what the runtime hands over."""
    from avlprof.attention import triton_decode
    from avlprof.attention.call import AttentionCall
    from avlprof.runtime import ragged

    case = {"batch": 2, "sinks": False} | JOINED[name]
    batch, groups, size = (case[k] for k in ("batch", "kv_heads", "size"))
    dtype = HALF if case["sinks"] else torch.float32
    monkeypatch.setattr(triton_decode, "_LEAST_PART", 16)
    monkeypatch.setattr(ragged, "kernels_run", lambda tensor: True)
    generator = torch.Generator().manual_seed(len(name))

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = drawn(batch, groups * case["group"], 1, size)
    key, value = (drawn(batch, groups, 30, size)[:, :, 5:] for _ in range(2))
    run = [drawn(sum(case["lengths"]), size) for _ in range(2)]
    lengths = tuple(tuple(case["lengths"][row * groups : (row + 1) * groups]) for row in range(batch))
    places = torch.arange(sum(case["lengths"]))
    stored = ragged.RaggedHeads(*(part.to(DEVICE) for part in (*run, places)), lengths, dtype)
    firsts = torch.tensor([0, 4][:batch])
    bounds = Bounds(firsts.to(DEVICE), torch.tensor([24, 20][:batch]).to(DEVICE), 0)
    sinks = drawn(groups * case["group"]) if case["sinks"] else None
    states = [part.to(DEVICE) for part in (query, key, value)]
    options = {} if sinks is None else {"s_aux": sinks.to(DEVICE)}
    call = AttentionCall(0, None, *states, None, 0.25, 3.0 if case["sinks"] else None, None, options)
    out = stored.by_kernels(call, None, bounds)
    begin = 0
    for row in range(batch):
        for head in range(groups):
            end = begin + lengths[row][head]
            near = slice(int(firsts[row]), [25, 21][row])
            keys = torch.cat([run[0][begin:end], key[row, head, near]])
            values = torch.cat([run[1][begin:end], value[row, head, near]])
            for own in range(head * case["group"], (head + 1) * case["group"]):
                sink = None if sinks is None else sinks[own]
                wanted, _ = attended(query[row, own, 0], keys, values, 0.25, call.softcap, sink)
                near_by = 2e-3 if dtype == HALF else 1e-5
                torch.testing.assert_close(
                    out[row, 0, own].double().cpu(), wanted, atol=near_by, rtol=near_by
                )
            begin = end
