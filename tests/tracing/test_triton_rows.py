"""The kernels of a prompt's rows against the plain way of measuring, which other tests hold to oracles."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avlprof.attention.call import AttentionCall
from avlprof.tracing import RecordOptions
from avlprof.tracing.batch import BatchRows
from avlprof.tracing.columns import Columns
from avlprof.tracing.fused import measure_batch
from avlprof.tracing.prompt import MeasuredRows, PromptAttention, measure_prompt
from avlprof.tracing.sums import frames
from tests.helpers import Counted
from tests.interpreted import DEVICE, Launched, passes, runs_elsewhere, runs_here

PROMPTS = {
    "short": "s1 v20 t7",
    "long": "s3 v50 t9 v30 t11",
    "no vision": "s9",
    "no text": "s2 v30",
    "one": "v1",
}
PLAIN = {"prompts": ("long",), "heads": 2, "kv_heads": 2, "size": 16}
CASES = {
    "plain": PLAIN,
    "grouped": PLAIN | {"heads": 6, "size": 20},
    "ragged batch": PLAIN | {"prompts": tuple(PROMPTS)},
    "padded behind": PLAIN | {"prompts": ("long", "short"), "left": False},
    "all rows": PLAIN | {"prompts": ("short", "long"), "options": {"rows": "all"}},
    "heads apart": PLAIN | {"prompts": ("short", "no text"), "options": {"per_head": True, "rows": "all"}},
    "history": PLAIN | {"prompts": ("short", "long"), "options": {"history": 0.4}},
    "history of heads": PLAIN | {"options": {"history": 0.7, "per_head": True}},
    "window": PLAIN | {"prompts": ("long", "short"), "window": 30},
    "mask of heads": PLAIN | {"window": 50, "by_head": True},
    "blind rows": PLAIN | {"window": 0},
    "whole": PLAIN | {"causal": False},
    "soft cap": PLAIN | {"softcap": 1.5},
    "sinks": PLAIN | {"prompts": ("short", "long"), "sinks": (-3.0, 90.0)},
    "half": PLAIN | {"dtype": torch.float16},  # the interpreter cannot multiply bf16
    "transposed": PLAIN | {"transposed": True},
    "few covered": PLAIN | {"options": {"coverage_rows": 1, "vision_rows": 3, "coverages": (30, 100)}},
    "none covered": PLAIN | {"options": {"coverage_rows": 0}},
    "one token": PLAIN | {"prompts": ("one",)},
    "all levels and distances": PLAIN | {"prompts": ("short",), "options": asdict(RecordOptions())},
}


FIRST = ("grouped", "padded behind", "window", "sinks", "history", "half")  # the others are slow


def codes_of(prompt):
    kinds = {"s": 0, "v": 1, "t": 2}
    return torch.tensor([kinds[part[0]] for part in PROMPTS[prompt].split() for _ in range(int(part[1:]))])


def case_of(prompts, heads, kv_heads, size, left=True, options=None, window=None, by_head=False, **other):
    """A random call, the rows of its prompts and where their tokens lie."""
    dtype, flipped = other.get("dtype", torch.float32), other.get("transposed", False)
    codes = [codes_of(prompt).to(torch.int8) for prompt in prompts]
    length = max(map(len, codes))
    pads = [length - len(own) for own in codes]
    real = torch.stack(
        [(torch.arange(length) >= pad) if left else torch.arange(length) < length - pad for pad in pads]
    )
    generator = torch.Generator().manual_seed(length + heads)

    def drawn(count):
        shape = (len(codes), count, size, length) if flipped else (len(codes), count, length, size)
        values = 2 * torch.randn(shape, generator=generator)
        return (values.mT if flipped else values).to(dtype)

    mask = None
    if window is not None:
        near = torch.arange(length)[:, None] - torch.arange(length)
        mask = ((near >= 0) & (near < window))[None, None]
        if by_head:
            mask = torch.cat([mask, near[None, None] >= 0], dim=1)
    call = AttentionCall(
        layer=0,
        module=SimpleNamespace(is_causal=other.get("causal", True)),
        query=drawn(heads),
        key=drawn(kv_heads),
        value=torch.empty(0),
        mask=mask,
        scaling=size**-0.5,
        softcap=other.get("softcap"),
        kernel=lambda *_: None,
        options={"s_aux": torch.tensor(other["sinks"])} if "sinks" in other else {},
    )
    fewer = {"vision_rows": 4, "coverage_rows": 2, "coverages": (50, 90), "distances": (1, 2, 5, 16)}
    chosen = RecordOptions(**(fewer | (options or {})))
    plans = [MeasuredRows(Columns(own, torch.device("cpu"), chosen)) for own in codes]
    return call, plans, real


def plain(call, plan, row, real):
    """What one prompt's rows come to without kernels, its padding taken out."""
    own = real.nonzero()[:, 0]
    mask = call.mask
    if mask is not None:
        mask = mask[0][:, own][:, :, own]
        mask = mask[0] if len(mask) == 1 else mask
    return measure_prompt(
        PromptAttention(
            query=call.query[row][:, own],
            key=call.key[row][:, own],
            scaling=call.scaling,
            softcap=call.softcap,
            mask=mask,
            causal=call.module.is_causal,
            sinks=call.sinks,
        ),
        plan,
    )


@pytest.mark.parametrize(
    ("marks", "count"),
    [
        pytest.param("not slow", len(FIRST), marks=pytest.mark.full),
        pytest.param("slow", len(CASES) - len(FIRST), marks=pytest.mark.slow),
    ],
)
@runs_elsewhere
def test_the_kernels_in_the_interpreter(marks, count):
    launches = 2 if marks == "not slow" else 0
    passes(__file__, count + launches, "-m", marks, "-k", "kernels_equal or launches")


@runs_here
@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_kernels_equal_the_plain_way(name, monkeypatch):
    if name != "grouped":  # one part of the keys, as where rows are many
        monkeypatch.setattr("avlprof.tracing.triton_rows._LEAST_PART", 50)
    call, plans, real = case_of(**CASES[name])
    there = call._replace(
        query=call.query.to(DEVICE),
        key=call.key.to(DEVICE),
        mask=None if call.mask is None else call.mask.to(DEVICE),
        options={key: value.to(DEVICE) for key, value in call.options.items()},
    )
    close = 2e-3 if call.query.dtype is torch.float16 else 2e-5
    found = list(measure_batch(there, BatchRows.of(plans, real, torch.device(DEVICE))))
    assert len(found) == len(plans)
    for row, (sums, plan) in enumerate(zip(found, plans, strict=True)):
        wanted = plain(call, plan, row, real[row])
        rows = torch.tensor(list(plan.kinds.values()))[:, None]
        torch.testing.assert_close(
            sums.sums.values.double().cpu() / rows, wanted.sums.values / rows, atol=close, rtol=close
        )
        received = sums.received.cpu()[..., sums.columns]
        torch.testing.assert_close(received, wanted.received, atol=20 * close, rtol=close)
        if wanted.history is not None:
            torch.testing.assert_close(sums.history.cpu(), wanted.history, atol=20 * close, rtol=close)
        for ours, its in zip(*(frames([part.sums], plan.options)[0] for part in (sums, wanted)), strict=True):
            for level in plan.options.coverages:
                name = f"coverage_{level}"
                assert np.isnan(ours[name]) == np.isnan(its[name]), (ours["query"], name)
                if not np.isnan(its[name]):  # sums in fp32 may need a token more or less
                    assert abs(ours[name] - its[name]) <= 0.26, (ours["query"], ours["head"], name)


@runs_here
@pytest.mark.parametrize(("rows", "most"), [("default", 12), ("all", 16)])
def test_a_layer_takes_few_launches_for_a_whole_batch(rows, most, monkeypatch):
    from avlprof.tracing import triton_rows

    kernels = []
    for name in ("row_sums", "row_merge", "coverage_counts", "kind_sums", "received_sums"):
        monkeypatch.setattr(triton_rows, name, Launched(getattr(triton_rows, name), kernels))
    case = PLAIN | {"prompts": ("short", "no text", "one"), "options": {"rows": rows}}
    call, plans, real = case_of(**case)
    there = call._replace(query=call.query.to(DEVICE), key=call.key.to(DEVICE))
    plan = BatchRows.of(plans, real, torch.device(DEVICE))
    with Counted() as counted:
        sums = triton_rows.triton_rows(
            triton_rows.PromptRows(there.query, there.key, call.scaling, None, None, True, None), plan
        )
    assert sums.values.shape[0] == 3
    assert len(kernels) == 6
    operators = [name for name in counted.names if not name.startswith(("_to_copy", "lift"))]
    assert len(kernels) + len(operators) <= most, operators
