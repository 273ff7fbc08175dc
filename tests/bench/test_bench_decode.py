"""The decode bench: what it counts; what it times is not judged here."""

from __future__ import annotations

import time

import pytest
import torch

from avlprof.bench import decode
from avlprof.bench.decode import (
    ALL,
    ATTENTIONS,
    OURS,
    DecodeBench,
    run_decode_bench,
)
from avlprof.bench.decode_cost import PACKED, REFRESH, STOCK
from avlprof.bench.prefill import run_prefill_bench
from avlprof.bench.runners import Clock, PromptStates, Runner
from avlprof.bench.shapes import (
    IMAGE,
    decoder_shape,
    prompt,
    random_model,
)
from avlprof.errors import UserError
from avlprof.policy import DENSE, Policy, PromptShape, live_share
from tests.watching import Counts

SHAPE = decoder_shape("custom", hidden=64, intermediate=32, heads=4, kv_heads=2, layers=2, vocabulary=64)
VISION, TEXT = 60, SHAPE.text_tokens


@pytest.fixture(scope="module")
def costs():
    calls = []
    found = run_decode_bench(
        SHAPE,
        DecodeBench(batches=(3,), visions=(VISION,), budgets=(0.5, 0.2), rounds=2),
        Counts(lambda *seen: calls.append(seen)),
    )
    assert calls[-1][0] == calls[-1][1] == len(calls)
    return {cost.method: cost for cost in found}


def test_every_way_is_there(costs):
    budgets = [f"{way} {b}" for b in (0.5, 0.2) for way in ("masked", "masked eager", "keep", "core")]
    assert list(costs) == [STOCK, ATTENTIONS, OURS, PACKED, *budgets]
    for cost in costs.values():
        assert cost.step_ms > 0
        assert cost.attention_ms > 0
        assert cost.speedup_low <= cost.speedup <= cost.speedup_high
        assert (cost.batch, cost.vision, cost.layers, cost.rounds) == (3, VISION, 2, 2)
    assert costs[STOCK].speedup == 1.0


@pytest.mark.full  # a bench of its own
def test_captured_steps_stand_beside_the_others():
    found = run_decode_bench(SHAPE, DecodeBench(visions=(VISION,), rounds=2, attentions=False, captured=True))
    replayed = [cost for cost in found if cost.method.endswith(", captured")]
    under = [cost.method for cost in found if cost.method in (OURS, PACKED, "keep 0.2", "core 0.2")]
    assert [cost.method.removesuffix(", captured") for cost in replayed] == under
    assert all(cost.step_ms > 0 and cost.attention_ms != cost.attention_ms for cost in replayed)


def test_the_cap_is_the_bytes_of_a_dense_step_over_those_read(costs):
    token = 2 * 2 * 16 * 4  # keys and values, KV heads, head size, fp32
    dense = 2 * 3 * token * (1 + VISION + TEXT)
    model = random_model(SHAPE)
    parts = (*model.get_decoder().layers, model.get_output_embeddings())
    weights = sum(p.numel() * 4 for part in parts for p in part.parameters())
    for method, vision in (("keep 0.2", 12), ("core 0.2", (7 * 6 + 12) / 8), ("core 0.5", (7 * 15 + 30) / 8)):
        read = 2 * 3 * token * (1 + vision + TEXT)
        assert costs[method].cap == pytest.approx((weights + dense) / (weights + read))
    assert costs["masked 0.2"].cap == costs[OURS].cap == 1.0


def test_eviction_frees_and_a_mask_does_not(costs):
    assert costs["masked 0.2"].kv_bytes == costs[STOCK].kv_bytes
    assert costs["keep 0.2"].kv_bytes < costs["keep 0.5"].kv_bytes < costs[OURS].kv_bytes


def test_only_a_core_has_a_refresh(costs):
    assert costs["core 0.2"].refresh_overhead > 0
    assert costs["keep 0.2"].refresh_overhead != costs["keep 0.2"].refresh_overhead


def logits_of(runner, steps):
    found = []
    hook = runner.model.register_forward_hook(lambda *args: found.append(args[-1].logits[:, -1]))
    runner.steps(steps)
    hook.remove()
    return torch.stack(found)


def test_the_ways_decode_what_they_say():
    """Dense and stock agree, masks agree in sdpa and eager; the rest differ from stock."""
    model = random_model(SHAPE)
    inputs = prompt(model, SHAPE, vision=VISION)
    states = PromptStates.of(model, inputs["input_ids"].shape[1])
    hidden = torch.arange(5, 50)

    def filled(name, **options):
        runner = Runner(name, model, inputs, 2, **options)
        runner.fill(states)
        return runner

    stock = filled("stock")
    twin, eager = (Runner("twin", model, inputs, 2, hidden=hidden, eager=eager) for eager in (False, True))
    twin.filled_as(stock)
    eager.filled_as(stock)
    masked = filled("masked", hidden=hidden)
    plain = logits_of(stock, REFRESH)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits_of(filled("dense", policy=DENSE), REFRESH), plain, **close)
    torch.testing.assert_close(logits_of(filled("packed", policy=decode.KEEP_ALL), REFRESH), plain, **close)
    shown = logits_of(masked, REFRESH)
    assert torch.equal(shown, logits_of(twin, REFRESH))
    torch.testing.assert_close(shown, logits_of(eager, REFRESH), **close)
    for other in (filled("mask", hidden=hidden), filled("keep", policy=Policy(vision_keep=0.1))):
        assert not torch.allclose(logits_of(other, REFRESH), plain, atol=1e-4)
    # after steps, timed or not, the sequences are equally long
    masked.attention_steps(3)
    assert masked.cache.get_seq_length() == 1 + VISION + TEXT + REFRESH + 3
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_a_cache_is_filled_as_by_a_prompt():
    """Random states count and lie as those of a forward do, and are the same whenever they are asked for."""
    model = random_model(SHAPE)
    inputs = prompt(model, SHAPE, vision=VISION)
    states = PromptStates.of(model, inputs["input_ids"].shape[1])
    policy = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=4, heads="kv_head")
    runner = Runner("core", model, inputs, 2, policy=policy)
    runner.fill(states)
    shape = PromptShape(1, VISION, TEXT)
    for use in runner.cache.use():
        assert use.prompt / use.dense_prompt == pytest.approx(live_share(policy, [shape], 2))
    for index, layer in enumerate(runner.cache.layers):
        query, key, value = states.layer(index)
        assert key.mean().abs() < 0.1
        assert key.std() == pytest.approx(1, abs=0.1)
        kept, _ = layer.vision_positions(1)
        vision = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        scores = torch.stack(
            [
                (query[0, h : h + 2, -1] @ key[0, h // 2].mT * 16**-0.5).softmax(-1).mean(0)[vision]
                for h in (0, 2)
            ]
        )
        for head in range(2):
            best = vision[scores[head].topk(VISION // 2).indices]
            assert set(kept[head].tolist()) == set(best.tolist())
        held = layer.positions[1, 0, : layer._left]
        torch.testing.assert_close(layer.keys[1, 0, : layer._left], key[0, 0, held])
        torch.testing.assert_close(layer.values[1, 0, : layer._left], value[0, 0, held])
    again = PromptStates.of(model, states.length)
    assert torch.equal(again.layer(1)[2], states.layer(1)[2])
    assert not torch.equal(states.layer(0)[1], states.layer(1)[1])


def test_stock_caches_share_a_prompt_and_go_back_to_it():
    model = random_model(SHAPE)
    inputs = prompt(model, SHAPE, vision=VISION)
    stock = Runner("stock", model, inputs, 1)
    stock.fill(PromptStates.of(model, inputs["input_ids"].shape[1]))
    other = Runner("masked", model, inputs, 1, hidden=torch.arange(5, 50))
    other.filled_as(stock)
    pointers = [layer.keys.data_ptr() for layer in stock.cache.layers]
    first = logits_of(stock, 2)
    assert [layer.keys.data_ptr() for layer in other.cache.layers] == pointers
    stock.rewind()
    assert [layer.keys.data_ptr() for layer in stock.cache.layers] == pointers
    assert torch.equal(logits_of(stock, 2), first)


def test_the_clock_sees_what_a_refresh_does_after_attention():
    """The swaps of a refresh come after its attention, and belong to its time."""
    model = random_model(SHAPE, layers=1)
    inputs = prompt(model, SHAPE, vision=VISION)
    core = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=2)
    runner = Runner("core", model, inputs, 1, policy=core)
    runner.fill(PromptStates.of(model, inputs["input_ids"].shape[1]))
    layer = runner.cache.layers[0]
    after, slept = layer.after, 0.05

    def slow(step, weights):
        time.sleep(slept)
        after(step, weights)

    layer.after = slow
    plain, refresh = runner.attention_steps(2)
    assert plain < slept <= refresh


def test_what_does_not_fit_gets_a_row_with_a_note(monkeypatch):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 10 << 20)
    found = run_decode_bench(
        SHAPE, DecodeBench(batches=(1, 512), visions=(VISION,), rounds=1, attentions=False)
    )
    assert [cost.batch for cost in found if cost.method == ALL] == [512]
    (left_out,) = (cost for cost in found if cost.method == ALL)
    assert "GiB are free" in left_out.note
    assert left_out.step_ms != left_out.step_ms
    assert len(found) == 8
    with pytest.raises(UserError, match="GiB are free; give fewer layers"):
        run_decode_bench(SHAPE, DecodeBench(batches=(512,), visions=(VISION,), rounds=1))


@pytest.fixture(scope="module")
def prefills():
    calls = []
    shape = decoder_shape("custom", hidden=64, intermediate=32, heads=4, kv_heads=2, layers=4, vocabulary=64)
    found = run_prefill_bench(shape, (400,), rounds=1, watch=Counts(lambda *seen: calls.append(seen)))
    assert calls[-1][0] == calls[-1][1] == len(calls)
    return {cost.method: cost for cost in found}


def test_prefills_hold_what_their_policies_say(prefills):
    assert list(prefills) == ["stock", "dense", "keep 0.25", "fastv 0.25", "two filters 0.25"]
    token, text, reserve = 2 * 2 * 16 * 4, 1 + TEXT, 32
    held = {
        "stock": [400] * 4,
        "dense": [400] * 4,
        "keep 0.25": [100] * 4,
        "fastv 0.25": [400, 400, 100, 100],
        "two filters 0.25": [400, 200, 100, 100],
    }
    for method, visions in held.items():
        least = sum((text + vision) * token for vision in visions)
        assert least <= prefills[method].kv_bytes <= least + 4 * reserve * (token + 8) + 4 * 8 * (text + 400)


def test_filters_take_work_and_memory_away(prefills):
    """Exact counts: multiplications, and bytes that tensors take at the worst moment."""
    each = 64 * 16 * 2 * (4 + 2) + 3 * 64 * 32

    def work(tokens):
        return sum(n * each + n * n * 64 for n in tokens)

    n, few, half = 401 + TEXT, 101 + TEXT, 201 + TEXT
    assert prefills["fastv 0.25"].cap == pytest.approx(work([n] * 4) / work([n, n, few, few]))
    assert prefills["two filters 0.25"].cap == pytest.approx(work([n] * 4) / work([n, half, few, few]))
    assert prefills["keep 0.25"].cap == prefills["dense"].cap == prefills["stock"].cap == 1.0
    peaks = {name: cost.peak_bytes for name, cost in prefills.items()}
    assert peaks["keep 0.25"] < peaks["dense"]
    assert peaks["two filters 0.25"] < peaks["fastv 0.25"] < peaks["dense"]


def test_bad_prefills_are_refused():
    for options in ({"rounds": 0}, {"keep": 0.0}, {"layers": 2}, {"visions": ()}):
        with pytest.raises(UserError, match="a prefill bench needs"):
            run_prefill_bench(SHAPE, **{"visions": (50,), "layers": 3} | options)


def test_the_clock_adds_up_what_it_wraps():
    clock = Clock(torch.device("cpu"))
    assert clock.around(lambda a, b=1: a + b)(2, b=3) == 5
    first = clock.seconds
    assert first > 0
    with pytest.raises(ZeroDivisionError):
        clock.around(lambda: 1 / 0)()
    assert clock.seconds > first


def test_bad_numbers_are_refused():
    for options in ({"rounds": 0}, {"batches": (0,)}, {"budgets": (0.0,)}, {"visions": (0,)}):
        with pytest.raises(UserError, match="a decode bench needs"):
            run_decode_bench(SHAPE, DecodeBench(**options))
