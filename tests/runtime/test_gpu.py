"""What only a CUDA device can show: the same numbers as on the CPU, memory that falls, graphs.

The CPU's numbers are held to oracles by the other tests, so here the CPU is the oracle.
"""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from transformers import LogitsProcessorList

import avlprof
from avlprof.attention.call import Bounds, StepStates
from avlprof.attention.weights import group_mean, packed_attention, step_weights, weighted_values
from avlprof.bench.decode import DecodeBench, run_decode_bench
from avlprof.bench.shapes import decoder_shape
from avlprof.policy import DENSE, Policy
from avlprof.runtime.eviction import CoreSlots
from avlprof.runtime.graph import capture
from avlprof.runtime.layout import RowPlan, slot_classes
from avlprof.testing.models import cases, random_llava
from avlprof.tracing import RecordOptions
from avlprof.tracing.trace import FixedAnswers
from tests.helpers import STEPS, generate
from tests.policies import POLICIES, SCORED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
MODELS = dict(cases())


@pytest.fixture(autouse=True)
def exact_products():
    """Convolutions are rounded to TF32 unless told otherwise; products are not."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request):
    """The same model here and there."""
    build = MODELS[request.param]
    here, there = build(), build()
    there.model.to(DEVICE)
    return here, there


def moved(inputs):
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def answered(model, inputs, policy, tokens=None, captured=None, steps=STEPS):
    """An answer's ids and logits under a policy; `tokens` are said whatever the logits are."""
    prompt = inputs["input_ids"].shape[1]
    said = LogitsProcessorList([] if tokens is None else [FixedAnswers(tokens.tolist(), prompt)])
    with avlprof.apply(model, policy, captured=captured) if policy else contextlib.nullcontext():
        found = generate(model, inputs, steps, logits_processor=said)
    return found.sequences[:, prompt:], torch.stack(found.logits)


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_give_the_numbers_of_the_cpu(pair, name):
    here, there = pair
    inputs = here.inputs(batch=3, seed=11, pad=True, text=15, images_per_row=[1, 0, 2])
    tokens, logits = answered(here.model, inputs, POLICIES[name])
    _, found = answered(there.model, moved(inputs), POLICIES[name], tokens)
    torch.testing.assert_close(found.cpu(), logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["dense", *sorted(set(POLICIES) - SCORED)])
def test_graphs_replay_the_same_steps(pair, name):
    policy = DENSE if name == "dense" else POLICIES[name]
    _, there = pair
    inputs = moved(there.inputs(batch=3, seed=7, pad=True, text=15, images_per_row=[1, 0, 2]))
    tokens, logits = answered(there.model, inputs, policy)
    _, found = answered(there.model, inputs, policy, tokens, captured=9)
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_graphs_outlive_a_call(fused):
    """Prompts of nearby lengths replay what the first one captured, each with its own content."""
    case = random_llava()
    model = case.model.to(DEVICE)
    policy = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=3)
    batches = [moved(case.inputs(batch=2, pad=True, seed=seed, text=text)) for seed, text in ((1, 9), (2, 7))]
    plain = [answered(model, inputs, policy) for inputs in batches]
    with avlprof.apply(model, policy, captured=STEPS, fused=fused) as runtime:
        for inputs, (tokens, logits) in zip(batches, plain, strict=True):
            prompt = inputs["input_ids"].shape[1]
            said = LogitsProcessorList([FixedAnswers(tokens.tolist(), prompt)])
            found = torch.stack(generate(model, inputs, logits_processor=said).logits)
            torch.testing.assert_close(found, logits, atol=1e-3, rtol=1e-3)
            assert runtime.captures == 2


def test_recorded_graphs_give_what_recorded_steps_give():
    case = random_llava()
    model, inputs = case.model.to(DEVICE), moved(case.inputs(batch=2, pad=True))
    policy = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=3)
    tokens, _ = answered(model, inputs, policy)
    said = LogitsProcessorList([FixedAnswers(tokens.tolist(), inputs["input_ids"].shape[1])])
    found = []
    for captured in (None, STEPS):
        with avlprof.apply(model, policy, captured=captured), avlprof.record(model) as recorder:
            generate(model, inputs, logits_processor=said)
        found.append([record.scores()["decode"] for record in recorder.records])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(torch.from_numpy(other), torch.from_numpy(one), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pad", [False, True])
def test_keep_all_is_bit_equal_in_bf16(pad):
    case = random_llava()
    model, inputs = case.model.to(DEVICE, torch.bfloat16), moved(case.inputs(batch=3, seed=5, pad=pad))
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    for ours, stock in zip(answered(model, inputs, DENSE), answered(model, inputs, None), strict=True):
        assert torch.equal(ours, stock)


def test_memory_falls_with_eviction():
    case = random_llava(grid=24, layers=4)
    model, inputs = case.model.to(DEVICE), moved(case.inputs(batch=4))
    held = {}
    for name, policy in {"dense": DENSE, "tenth": Policy(vision_keep=0.1)}.items():
        with avlprof.apply(model, policy) as runtime, torch.no_grad():
            gc.collect()
            before = torch.cuda.memory_allocated(DEVICE)
            model(**inputs, use_cache=True)
            gc.collect()
            held[name] = torch.cuda.memory_allocated(DEVICE) - before
            allocated = sum(use.allocated for use in runtime.cache.use())
            runtime.cache = None
        assert held[name] >= 0.9 * allocated, name
    assert held["tenth"] < 0.35 * held["dense"]


@pytest.mark.parametrize("rows", ["default", "all"])
def test_the_recorder_gives_the_numbers_of_the_cpu(pair, rows):
    here, there = pair
    inputs = here.inputs(batch=2, seed=3, pad=True, text=15)
    frames, scores = [], []
    for case, given in ((here, inputs), (there, moved(inputs))):
        with avlprof.record(case.model, RecordOptions(rows=rows, history=0.5)) as recorder, torch.no_grad():
            case.model(**given, use_cache=True)
        frames.append([row for record in recorder.records for row in record.frame()])
        scores.append([record.scores() for record in recorder.records])
    for a, b in zip(*frames, strict=True):
        for name in ("mass_vision", "mass_system", "mass_text", "mass_sink", "entropy"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), (a["layer"], a["query"], name)
    for a, b in zip(*scores, strict=True):
        for name in a:
            torch.testing.assert_close(
                torch.from_numpy(a[name]), torch.from_numpy(b[name]), atol=1e-4, rtol=1e-3
            )


def test_the_decode_bench_runs_with_graphs():
    shape = decoder_shape("custom", hidden=256, intermediate=64, heads=4, kv_heads=2, layers=2, vocabulary=64)
    found = run_decode_bench(shape, DecodeBench(batches=(1, 4), visions=(300,), rounds=2, device=DEVICE))
    assert {cost.method for cost in found} >= {"dense, packed, captured", "core 0.2, captured"}
    assert all(cost.step_ms > 0 for cost in found)


@pytest.mark.parametrize(("batch", "kv_heads", "group"), [(1, 4, 7), (3, 2, 1), (2, 8, 4)])
def test_a_step_by_kernels_in_bf16(batch, kv_heads, group):
    """Ragged rows of a long view against fp32, and against the stock kernel with a mask."""
    from avlprof.attention.triton_decode import triton_decode

    generator = torch.Generator(DEVICE).manual_seed(batch)
    heads, length, size = kv_heads * group, 3001, 128

    def drawn(*shape):
        return torch.randn(*shape, size, generator=generator, device=DEVICE).to(torch.bfloat16)

    query, key, value = drawn(batch, heads, 1), drawn(batch, kv_heads, length), drawn(batch, kv_heads, length)
    firsts = torch.arange(batch, device=DEVICE) * 700
    lasts = length - 1 - torch.arange(batch, device=DEVICE) * 45
    column = torch.arange(length, device=DEVICE)
    mask = ((column >= firsts[:, None]) & (column <= lasts[:, None]))[:, None, None]
    states = StepStates(query, key, value, size**-0.5, mask=mask, bounds=Bounds(firsts, lasts, 0))
    exact = [tensor.float() for tensor in (query, key, value)]
    wanted = step_weights(*exact[:2], size**-0.5, mask)
    out = weighted_values(wanted, exact[2])
    for sets in (0, 1, kv_heads):
        found, weights = triton_decode(states, sets)
        torch.testing.assert_close(found.float(), out, atol=5e-3, rtol=2e-2)
        if sets:
            torch.testing.assert_close(weights.float(), group_mean(wanted, sets), atol=1e-5, rtol=2e-2)
    stock = packed_attention(query, key, value, size**-0.5, mask)
    torch.testing.assert_close(stock.float(), out, atol=5e-3, rtol=2e-2)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_refresh_by_kernels_moves_what_operators_move(groups):
    """Five thousand slots, scores of few values so that most of them tie; the exchange is captured."""
    generator = torch.Generator(DEVICE).manual_seed(groups)
    plans = [RowPlan(3, 5000, 700, 0, 0, None), RowPlan(1, 900, 450, 0, 0, None)]
    left = 5003
    core = CoreSlots.of(plans, slot_classes(plans, [0, 0], left, left, DEVICE))
    scores = torch.randint(0, 50, (2, groups, left), generator=generator, device=DEVICE) / 64
    positions = torch.stack(
        [torch.randperm(9000, generator=generator, device=DEVICE)[:left] for _ in range(8)]
    )
    positions = positions.view(2, 4, left)[:, :groups].contiguous()
    keys = torch.randn(2, 4, left, 64, generator=generator, device=DEVICE).to(torch.bfloat16)
    wanted = [tensor.clone() for tensor in (keys, keys, positions)]
    core.exchange(core.best(scores, positions, groups), tuple(wanted), fixed=True)
    found = [tensor.clone() for tensor in (keys, keys, positions)]

    def refresh():
        for tensor, own in zip(found, (keys, keys, positions), strict=True):
            tensor.copy_(own)
        core.refresh(scores, 0, tuple(found), groups, fixed=True)
        return found[0]

    _, replay = capture(refresh, DEVICE)
    replay()
    for tensor, expected in zip(found, wanted, strict=True):
        assert torch.equal(tensor, expected)
