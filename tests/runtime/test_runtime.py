"""The runtime against the stock model and against a plain dense oracle."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import avlprof
from avlprof.attention.codec import packed_bytes
from avlprof.attention.session import cache_of, switched, with_cache
from avlprof.attention.weights import packed_attention, row_weights, step_weights, weighted_values
from avlprof.bench.shapes import decoder_shape, prompt, random_model
from avlprof.errors import UserError
from avlprof.policy import (
    DENSE,
    AllocatorSpec,
    JointPool,
    Policy,
    PromptShape,
    ScorerSpec,
    TextPolicy,
    scale_group,
    sizes,
)
from avlprof.runtime.buffers import RESERVE
from avlprof.runtime.eviction import CoreSlots
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.runtime.layout import RowPlan, slot_classes
from avlprof.runtime.packed import stored_weights
from avlprof.runtime.windows import Windows
from avlprof.testing.models import cases, random_llava
from tests.helpers import FEW_MODELS, few, generate, one_row, thinned, waits
from tests.oracle import NEAR_TIE, Oracle
from tests.policies import POLICIES, QUICK, TESTED

MODELS = dict(cases())
CORED = (
    *("packed core", "packed per head", "packed score only", "packed history", "packed scored"),
    "packed text and core",
)
"""Policies whose cores change places with what few bits store."""


@pytest.fixture(scope="module", params=few(MODELS, FEW_MODELS))
def case(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("batch", few([1, 4], [4]))
def test_keep_all_is_the_stock_model(case, batch, pad):
    inputs = case.inputs(batch=batch, pad=pad, seed=3)
    stock = generate(case.model, inputs)
    for policy in (DENSE, Policy(vision_keep=1.0, text=TextPolicy(window=500))):
        with avlprof.apply(case.model, policy):
            ours = generate(case.model, inputs)
        for step, (a, b) in enumerate(zip(ours.logits, stock.logits, strict=True)):
            top = b.topk(2).values
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            if not torch.equal(a.argmax(-1), b.argmax(-1)):
                assert (top[:, 0] - top[:, 1]).min() < 1e-3, step
                break


@pytest.mark.parametrize("pad", [False, True])
def test_keep_all_is_bit_equal_in_bf16(case, pad):
    inputs = case.inputs(batch=3, pad=pad, seed=5)
    model = case.model.to(torch.bfloat16)
    try:
        inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
        stock = generate(model, inputs, steps=8)
        with avlprof.apply(model, DENSE):
            ours = generate(model, inputs, steps=8)
        assert torch.equal(stock.sequences, ours.sequences)
        assert all(torch.equal(a, b) for a, b in zip(stock.logits, ours.logits, strict=True))
    finally:
        case.model.to(torch.float32)


@pytest.mark.parametrize("name", thinned(POLICIES, TESTED, QUICK))
def test_agrees_with_the_dense_oracle(case, name):
    policy = POLICIES[name]
    oracle = Oracle(case.model, policy, case.vision_token_ids)
    for seed in range(11, 23):
        inputs = case.inputs(batch=1, seed=seed, text=13, images_per_row=2 if "core" in name else 1)
        with avlprof.apply(case.model, policy) as runtime:
            ours = generate(case.model, inputs, suppress_tokens=list(case.vision_token_ids))
        answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits, trace = oracle.run(inputs, answer[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE, "near-ties decide the sets of every seed"
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=1e-4, rtol=1e-4)
    for index, layer in enumerate(runtime.cache.layers):
        if not isinstance(layer, AdaptiveLayer):
            continue
        kept, core = layer.vision_positions(0)
        if policy.joint is None:
            assert [set(row.tolist()) for row in kept] == trace.kept[index]
            assert [set(row.tolist()) for row in core] == trace.cores[index][-1]
        assert [set(row.tolist()) for row in layer.text_positions(0)] == trace.text[index][-1]


@pytest.mark.parametrize(  # text in few bits of rows that differ: test_turns
    "name", thinned(POLICIES, set(TESTED) - {"packed text and core"}, ("core and window",))
)
def test_a_row_of_a_batch_is_the_row_alone(case, name):
    policy = POLICIES[name]
    oracle = Oracle(case.model, policy, case.vision_token_ids)
    left = {0, 1, 2}  # rows that no near-tie has kept from being compared
    for seed in (2, 3, 5, 7, 8, 9, 13, 17, 19, 23, 29, 31):
        batch = case.inputs(batch=3, seed=seed, pad=True, text=15, images_per_row=[1, 0, 2])
        with avlprof.apply(case.model, policy):
            together = generate(case.model, batch, suppress_tokens=list(case.vision_token_ids))
        width = batch["input_ids"].shape[1]
        for row in sorted(left):
            single = one_row(case, batch, row)
            answer = together.sequences[row, width:].tolist()
            logits, trace = oracle.run(single, answer[:-1])
            if trace.gap > NEAR_TIE:
                ours = torch.stack([step[row] for step in together.logits])
                torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
                left.remove(row)
        if not left:
            break
    assert not left, "near-ties decide the sets of every seed"


@pytest.mark.parametrize("name", list(POLICIES))
def test_live_bytes_are_the_policys_sizes(case, name):
    policy = POLICIES[name]
    inputs = case.inputs(batch=3, seed=4, pad=True, text=12)
    with avlprof.apply(case.model, policy) as runtime, torch.no_grad():
        case.model(**inputs, use_cache=True)
    layers = len(runtime.cache.layers)
    for use, layer in zip(runtime.cache.use(), runtime.cache.layers, strict=True):
        group = scale_group(16)
        shapes = [replace(shape, group=group) for shape in runtime.cache.rows]
        wanted = sum(sizes(policy, shape, layers)[use.layer].live for shape in shapes)
        assert use.live == use.prompt == wanted * layer.bytes_per_token()
        slots, index = 3 * inputs["input_ids"].shape[1] + 3 * RESERVE, 0
        if isinstance(layer, AdaptiveLayer):
            plans = runtime.cache.row_plans(use.layer)
            most = max(p.text for p in plans)
            running = layer.rule.running is not None
            room = min(max(0, max(p.limit or 0 for p in plans) - most), RESERVE) + running
            if any(p.limit is None for p in plans):
                room = RESERVE
            cored = layer.bits < 16  # what few bits store lies beside
            slots = 3 * (max(p.system + (p.core if cored else p.vision) for p in plans) + most + room)
            index = 8 * slots * layer.positions.shape[1]
            index += 4 * 3 * (most + room) * layer.positions.shape[1] if running else 0
            beside = [(layer.bits, max(p.vision - p.core for p in plans))] if cored else []
            if layer.text_bits < 16:
                beside.append((layer.text_bits, max(p.low_system + p.low_text for p in plans)))
            for bits, most in beside:
                each = 2 * layer.keys.shape[1] * packed_bytes(16, bits)
                index += 3 * most * (8 * layer.positions.shape[1] + each)
            if policy.scores_core:  # by position, of all tokens
                sets = layer.keys.shape[1] if policy.heads == "kv_head" else 1
                index += 4 * 3 * sets * (2 * inputs["input_ids"].shape[1] + 1)
        assert use.allocated == slots * 2 * layer.bytes_per_token() + index  # the model runs in fp32


def test_a_wide_window_is_not_allocated_ahead():
    case = random_llava()
    inputs = case.inputs()
    with avlprof.apply(case.model, Policy(text=TextPolicy(window=10**9))) as runtime:
        ours = generate(case.model, inputs, steps=2 * RESERVE + 5)
    stock = generate(case.model, inputs, steps=2 * RESERVE + 5)
    assert torch.equal(ours.sequences, stock.sequences)
    for layer in runtime.cache.layers:
        assert layer.keys.shape[2] <= 3 * (inputs["input_ids"].shape[1] + RESERVE)


def test_an_allocator_is_resolved_for_the_model():
    case = random_llava()
    policy = Policy(vision_keep=0.4, allocator=AllocatorSpec(name="pyramid"))
    with avlprof.apply(case.model, policy) as runtime:
        assert len(runtime.policy.keep(3)) == 3
        assert runtime.policy.keep(3)[0] > runtime.policy.keep(3)[2]
    with pytest.raises(UserError, match="the profile of a traced run"):
        with avlprof.apply(case.model, "prefixkv"):
            pass


def test_evicted_memory_is_freed():
    case = random_llava(grid=12, layers=2)
    inputs = case.inputs(batch=2)
    with avlprof.apply(case.model, Policy(vision_keep=0.1)) as runtime, torch.no_grad():
        case.model(**inputs, use_cache=True)
        kept = sum(use.allocated for use in runtime.cache.use())
    with avlprof.apply(case.model, DENSE) as runtime, torch.no_grad():
        case.model(**inputs, use_cache=True)
        dense = sum(use.dense_prompt for use in runtime.cache.use())
    reserve = 2 * 2 * 32 * runtime.cache.layers[0].bytes_per_token()
    assert kept <= 2 * (0.25 * dense + reserve)  # the model runs in fp32


class Attended:
    """Keeps what every layer was handed to attend to."""

    def __init__(self):
        self.calls = []

    def begin(self, forward):
        """Nothing to prepare."""

    def attended(self, forward, call):
        self.calls.append(call)


def test_an_ordinary_step_copies_nothing():
    case = random_llava()
    inputs = case.inputs(batch=2)
    policy = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=4)
    with avlprof.apply(case.model, policy) as runtime, torch.no_grad():
        cache = cache_of(case.model(**inputs, use_cache=True))
        buffers = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        seen = Attended()
        with switched(case.model, observers=(seen,)):
            mask = inputs["attention_mask"]
            for _ in range(3):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
                case.model(
                    input_ids=torch.full((2, 1), 7), attention_mask=mask, **with_cache(case.model, cache)
                )
        assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == buffers
        assert len(seen.calls) == 3 * len(cache.layers)
        for call in seen.calls:
            layer = cache.layers[call.layer]
            for attended, buffer in ((call.key, layer.keys), (call.value, layer.values)):
                assert attended.shape[2] < layer.seen
                assert attended.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert runtime.cache is cache


@pytest.mark.parametrize("name", ["core, k=3", "core and window", "score only", "newest share", "streaming"])
def test_reads_are_counted_as_the_policy_says(case, name):
    policy = POLICIES[name]
    inputs = case.inputs(batch=1, seed=8)
    steps = 12
    with avlprof.apply(case.model, policy) as runtime:
        generate(case.model, inputs, steps=steps + 1)
    shape = runtime.cache.rows[0]
    wanted = avlprof.policy.read_share(policy, [shape], 3, steps)
    use = runtime.cache.use()
    assert sum(u.read for u in use) / sum(u.dense_prompt for u in use) == pytest.approx(wanted)


def test_streaming_keeps_sinks_and_the_newest():
    case = random_llava()
    policy = Policy(
        pool="joint", joint=JointPool(keep=0.3, sink=2), scorer=ScorerSpec(name="position"), name="streaming"
    )
    inputs = case.inputs(batch=1)
    prompt = inputs["input_ids"].shape[1]
    with avlprof.apply(case.model, policy) as runtime:
        generate(case.model, inputs, steps=15)
    held = sizes(policy, PromptShape(0, 0, prompt), 3)[0].stored
    for layer in runtime.cache.layers:
        positions = layer.step.positions
        newest = range(prompt + 14 - (held - 2), prompt + 14)
        assert set(positions[0, 0].tolist()) == {0, 1, *newest}


def test_beams_and_returned_sequences_keep_their_rows_apart(case):
    inputs = case.inputs(batch=2, pad=True, seed=6)
    keep_all = Policy(text=TextPolicy(window=400))
    options = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    stock = case.model.generate(**inputs, **options)
    with avlprof.apply(case.model, keep_all):
        ours = case.model.generate(**inputs, **options)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize(
    "name",
    few(
        [
            *("core and window", "scored per head", "history", "heavy", "h2o", "tova", "newest share"),
            *("triggered per head", "triggered and followed", "followed"),
        ],
        2,
    ),
)
def test_beams_take_their_state_along(name):
    """Reordered rows go on as if each had been alone: against the oracle of the winning answer."""
    case, policy = random_llava(), POLICIES[name]
    inputs = case.inputs(batch=2, pad=True, seed=6)
    with avlprof.apply(case.model, policy):
        found = case.model.generate(
            **inputs,
            max_new_tokens=12,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            suppress_tokens=list(case.vision_token_ids),
            output_scores=True,
            return_dict_in_generate=True,
            length_penalty=1.0,
        )
    width = inputs["input_ids"].shape[1]
    for index, ids in enumerate(found.sequences):
        answer = ids[width:].tolist()
        logits, _ = Oracle(case.model, policy, case.vision_token_ids).run(
            one_row(case, inputs, index // 2), answer[:-1]
        )
        said = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        assert float(found.sequences_scores[index]) == pytest.approx(float(said.mean()), abs=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("core, k=1", "core, k=3", "per head", "score only", "history", "scored history", *CORED),
        *("triggered and followed", "followed per head", "packed triggered", "packed followed"),
    ],
)
def test_swaps_of_fixed_shapes_are_the_counted_ones(name):
    """The form that devices run, which never asks how many swaps there are."""
    case, policy = random_llava(), POLICIES[name]
    inputs = case.inputs(batch=3, seed=2, pad=True, text=15, images_per_row=[1, 0, 2])
    found = []
    for fixed in (False, True):
        with avlprof.apply(case.model, policy) as runtime:
            cache = runtime.new_cache()
            for layer in cache.layers:
                layer.fixed_shapes = fixed
            out = generate(case.model, inputs, **with_cache(case.model, cache))
        cores = [layer.vision_positions(row) for layer in cache.layers for row in range(3)]
        found.append((torch.stack(out.logits), [[set(r.tolist()) for r in core] for _, core in cores]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_core_is_the_best_with_ties_to_the_lower_position(groups):
    """Against a sort in plain Python; weights of few values, so that most of them tie."""
    generator = torch.Generator().manual_seed(groups)
    plans = [RowPlan(2, 9, 4, 3, 0, None), RowPlan(1, 12, 7, 3, 0, None), RowPlan(5, 0, 0, 3, 0, None)]
    left = 13
    core = CoreSlots.of(plans, slot_classes(plans, [3, 3, 3], left, left, torch.device("cpu")))
    weights = torch.randint(0, 4, (3, 4, left), generator=generator) / 64
    positions = torch.stack([torch.randperm(90, generator=generator)[:left] for _ in range(6)])
    positions = positions.view(3, 2, left)
    found = core.best(weights, positions, groups)
    for row, plan in enumerate(plans):
        vision = range(left - plan.system - plan.vision, left - plan.system)
        for group in range(groups):
            heads = range(4) if groups == 1 else range(2 * group, 2 * group + 2)
            mean = [sum(float(weights[row, head, slot]) for head in heads) for slot in range(left)]
            ranked = sorted(vision, key=lambda slot: (-mean[slot], int(positions[row, group, slot])))
            assert set(found[row, group].nonzero()[:, 0].tolist()) == set(ranked[: plan.core])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_an_exchange_moves_what_changes_and_nothing_else(groups, fixed):
    generator = torch.Generator().manual_seed(groups)
    plans = [RowPlan(1, 40, 15, 0, 0, None), RowPlan(3, 30, 30, 0, 0, None)]
    left = 41
    core = CoreSlots.of(plans, slot_classes(plans, [0, 0], left, left, torch.device("cpu")))
    weights = torch.rand(2, 3, left, generator=generator)
    places = torch.stack([torch.randperm(99, generator=generator)[: left + 4] for _ in range(2 * groups)])
    places = places.view(2, groups, -1)
    # every slot tells where it came from: row, head and slot
    keys = torch.arange(2 * 3 * (left + 4)).view(2, 3, -1, 1).expand(-1, -1, -1, 8).float().contiguous()
    new = core.best(weights, places[..., :left], groups)
    before = keys.clone()
    core.exchange(new, (keys, places), fixed)
    for row, plan in enumerate(plans):
        first, last = left - plan.system - plan.core, left - plan.system
        for head in range(3):
            group = head if groups == 3 else 0
            wanted = before[row, head, :left, 0][new[row, group]]
            assert set(keys[row, head, first:last, 0].tolist()) == set(wanted.tolist())
            moved = (keys[row, head] != before[row, head]).any(dim=-1)
            stays = new[row, group] & core.core[row, 0]
            assert not moved[:left][stays].any()
            assert not moved[left:].any()
            assert int(moved.sum()) == 2 * (plan.core - int(stays.sum()))
            assert sorted(keys[row, head, :, 0].tolist()) == before[row, head, :, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 4, 300), (4, 4, 20), (6, 2, 300), (3, 1, 7)])
def test_one_row_attends_as_plain_softmax_does(heads, kv_heads, length, dtype):
    """Views of a buffer, masks of rows and heads, soft caps, sinks; through the weights and without."""
    generator = torch.Generator().manual_seed(length)
    size, scaling = 16, 0.3
    buffers = [torch.randn(3, kv_heads, length + 9, size, generator=generator).to(dtype) for _ in range(2)]
    key, value = (buffer[:, :, 4 : 4 + length] for buffer in buffers)
    query = torch.randn(3, heads, 1, size, generator=generator).to(dtype)
    each = heads // kv_heads
    masks = [torch.rand(3, n, 1, length, generator=generator) > 0.3 for n in (1, kv_heads)]
    sunk = torch.linspace(-2.0, 6.0, heads)
    loose = {"atol": 0.02, "rtol": 0.02} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    for mask in (None, *masks):
        for softcap, sinks in ((None, None), (2.0, None), (None, sunk), (2.0, sunk)):
            logits = query.float() @ key.float().repeat_interleave(each, dim=1).mT * scaling
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if mask is not None:
                wide = mask if mask.shape[1] == 1 else mask.repeat_interleave(each, dim=1)
                logits = logits.masked_fill(~wide, -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(3, -1, -1, -1)], dim=-1)
            wanted = logits.softmax(dim=-1)[..., :length]
            out = (wanted @ value.float().repeat_interleave(each, dim=1)).transpose(1, 2)
            weights = step_weights(query, key, scaling, mask, softcap, sinks)
            assert weights.dtype == torch.float32
            torch.testing.assert_close(weights, wanted[:, :, 0], **loose)
            torch.testing.assert_close(weighted_values(weights, value).float(), out, **loose)
            packed = packed_attention(query, key, value, scaling, mask, softcap, sinks)
            torch.testing.assert_close(packed.float(), out, **loose)


def test_a_window_shows_each_row_what_it_holds():
    """Masks that are carried from step to step, against the rows' counts."""
    plans = [RowPlan(1, 6, 3, 4, 0, None), RowPlan(2, 8, 2, 2, 0, None), RowPlan(4, 0, 0, 5, 0, None)]
    left, capacity = 10, 24
    windows = Windows(plans, left)
    counts, claims = [4, 2, 5], [(4, 2, 5), (5, 3, 6), (1, 4, 0), (6, 5, 3), (0, 6, 2), (7, 3, 7), (2, 7, 4)]
    for claimed in claims:
        windows.slot(list(claimed), torch.device("cpu"))
        counts = [max(count, slot + 1) for count, slot in zip(counts, claimed, strict=True)]
        for whole in (False, True):
            start, end = windows.span(counts, whole)
            mask = windows.mask(counts, whole, capacity, torch.device("cpu"))
            if mask is None:
                assert len(set(counts)) == 1
                assert not whole
                continue
            assert mask.shape == (3, 1, 1, end - start)
            for row, (plan, count) in enumerate(zip(plans, counts, strict=True)):
                own = plan.system + (plan.vision if whole else plan.core)
                seen = mask[row, 0, 0].nonzero()[:, 0] + start
                assert seen.tolist() == list(range(left - own, left + count))
    even = Windows([plans[0]] * 2, left)
    assert even.mask([3, 3], True, capacity, torch.device("cpu")) is None


class HostReads(TorchDispatchMode):
    """Notes operations by which the host would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["core, k=1", "history", "h2o", "tova", "score only", "core and window", "scored core", *CORED]
)
def test_a_step_asks_the_device_nothing(name):
    case, policy = random_llava(), POLICIES[name]
    generator = torch.Generator().manual_seed(0)
    with avlprof.apply(case.model, policy) as runtime, torch.no_grad():
        inputs = case.inputs(batch=2, text=15)
        cache = runtime.new_cache()
        case.model(**inputs, **with_cache(case.model, cache))
        layer, (kv, size) = cache.layers[0], (2, 16)
        states = [torch.randn(2, kv, 1, size, generator=generator) for _ in range(2)]
        query = torch.randn(2, 4, 1, size, generator=generator)
        for fixed in (True, False):
            layer.fixed_shapes = fixed
            with HostReads() as asked:
                for _ in range(12):
                    keys, _ = layer.update(*states)
                    step = layer.step_for(query, 0.25, None)
                    if step.weighing:
                        weights = stored_weights(step.stored, query, keys, 0.25, step.mask)
                        layer.after(step, weights)
            assert bool(asked.found) == (not fixed and policy.refresh_interval > 0)


def test_buffers_grow_geometrically():
    case = random_llava()
    for name in ("history", "evict", "newest share"):
        with avlprof.apply(case.model, POLICIES[name]) as runtime, torch.no_grad():
            cache = cache_of(case.model(**case.inputs(), use_cache=True))
            layer = cache.layers[0]
            capacities, states = [], torch.ones(1, 2, 1, 16)
            for _ in range(400):
                keys, _ = layer.update(states, states)
                query = torch.ones(1, 4, 1, 16)
                step = layer.step_for(query, 0.25, None)
                if step.weighing:
                    layer.after(step, step_weights(query, keys, 0.25))
                capacities.append(layer.keys.shape[2])
            assert runtime.cache is cache
        grown = sorted(set(capacities))
        assert all(b >= 1.1 * a for a, b in itertools.pairwise(grown[2:]))
        assert layer.positions.shape[2] == capacities[-1]


def test_the_model_is_restored(case):
    inputs = case.inputs()
    config = case.model.config.get_text_config()
    before, implementation = generate(case.model, inputs, steps=4), config._attn_implementation

    def fail(error):
        with avlprof.apply(case.model, POLICIES["evict"]):
            generate(case.model, inputs, steps=2)
            raise error

    for error in (RuntimeError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert config._attn_implementation == implementation
    assert not case.model._forward_pre_hooks
    assert not any("_avlprof" in name for m in case.model.modules() for name in vars(m))
    after = generate(case.model, inputs, steps=4)
    assert torch.equal(before.sequences, after.sequences)


def test_the_cache_dies_with_its_last_user():
    case = random_llava()
    with avlprof.apply(case.model, POLICIES["evict"]) as runtime:
        generate(case.model, case.inputs(), steps=2)
        cache = weakref.ref(runtime.cache)
        runtime.cache = None
        gc.collect()
        assert cache() is None


def test_two_models_with_two_policies_in_one_process():
    first, second = random_llava(0), random_llava(1)
    inputs = first.inputs()
    with avlprof.apply(first.model, POLICIES["evict"]):
        alone = generate(first.model, inputs).sequences
    with avlprof.apply(first.model, POLICIES["evict"]), avlprof.apply(second.model, POLICIES["window"]):
        generate(second.model, second.inputs())
        both = generate(first.model, inputs).sequences
    assert torch.equal(alone, both)


def test_two_models_with_two_policies_in_two_threads():
    cases_of = [random_llava(0), MODELS["qwen2_5_vl-6q2kv"]()]
    policies = [POLICIES["history"], POLICIES["filter"]]
    inputs = [case.inputs(batch=2, seed=3, pad=True) for case in cases_of]

    def answer(index):
        with avlprof.apply(cases_of[index].model, policies[index]):
            return generate(cases_of[index].model, inputs[index], steps=16).sequences

    alone = [answer(0), answer(1)]
    start, found = threading.Barrier(2), {}

    def run(index):
        start.wait()
        found[index] = [answer(index) for _ in range(2)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert all(torch.equal(ids, alone[index]) for ids in found[index])


def test_recording_sees_what_was_attended_to_before_text_is_forgotten():
    case, policy = random_llava(), POLICIES["history"]
    inputs = case.inputs(seed=3, text=13)
    seen = []

    class Watcher:
        def begin(self, forward):
            """Nothing to prepare."""

        def attended(self, forward, call):
            if forward.step:
                newest = forward.modality.shape[1] - 1
                assert all(newest in row for row in call.positions[0].tolist())
                weights = row_weights(call.query, call.key, call.scaling, call.valid)[0, :, 0]
                out = weights.view(2, 2, -1) @ call.value[0]
                expected = packed_attention(call.query, call.key, call.value, call.scaling, call.valid)
                torch.testing.assert_close(out.view(1, 1, 4, -1), expected, atol=1e-5, rtol=1e-4)
                seen.append([sorted(row) for row in call.positions[0].tolist()])

    with avlprof.apply(case.model, policy), switched(case.model, observers=(Watcher(),)):
        ours = generate(case.model, inputs)
    assert all(len(set(row)) == len(row) for rows in seen for row in rows)
    with avlprof.apply(case.model, policy):
        assert torch.equal(generate(case.model, inputs).sequences, ours.sequences)


def test_misuse_is_refused_in_a_sentence():
    case = random_llava()
    inputs = case.inputs()
    with pytest.raises(UserError, match="written for 7 layers, the model has 3"):
        with avlprof.apply(case.model, Policy(vision_keep=(0.5,) * 7)):
            pass
    refused = pytest.raises((UserError, ValueError), match="cropped")  # by transformers itself from 5.24 on
    with refused, avlprof.apply(case.model, POLICIES["evict"]):
        case.model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=2)
    with pytest.raises(UserError, match="already runs under a policy"):
        with avlprof.apply(case.model, DENSE), avlprof.apply(case.model, DENSE):
            pass
    with avlprof.apply(case.model, POLICIES["evict"]), torch.no_grad():
        cache = cache_of(case.model(**inputs, use_cache=True))
        embeddings = case.model.get_input_embeddings()(torch.full((1, 3), 7))
        with pytest.raises(UserError, match="input_ids of a turn"):
            case.model(inputs_embeds=embeddings, **with_cache(case.model, cache))
    with pytest.raises(UserError, match="did you mean last_query"):
        with avlprof.apply(case.model, Policy(scorer=ScorerSpec(name="last_qeury"))):
            pass


@pytest.mark.parametrize(
    "policy",
    [
        Policy(vision_keep=0.2),
        Policy(vision_keep=0.4, vision_compute=0.1, refresh_interval=4, text=TextPolicy(window=12)),
    ],
)
def test_the_host_waits_by_the_prompt_and_not_by_the_layer(policy):
    """A wait in a layer lets a GPU run dry: its queue ends there."""
    shape = decoder_shape("custom", hidden=64, intermediate=32, heads=4, kv_heads=2, layers=5, vocabulary=64)
    counts = []
    for layers in (2, 5):
        model = random_model(shape, layers=layers)
        inputs = prompt(model, shape, vision=40, text=20, batch=2)
        with avlprof.apply(model, policy), torch.inference_mode(), waits() as found:
            model(**inputs, logits_to_keep=1)
        counts.append(found)
    assert len(counts[0]) == len(counts[1]) <= 6, counts
