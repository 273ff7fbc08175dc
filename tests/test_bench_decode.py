"""The decode bench: what it counts; what it times is not judged here."""

from __future__ import annotations

import pytest
import torch

from avlprof.errors import UserError
from avlprof.evaluation.bench.decode import ATTENTIONS, OURS, PACKED, REFRESH, STOCK, run_decode_bench
from avlprof.evaluation.bench.runners import Clock, Runner
from avlprof.evaluation.bench.shapes import decoder_shape, prompt, random_model
from avlprof.policy import DENSE, Policy

SHAPE = decoder_shape("custom", hidden=64, intermediate=32, heads=4, kv_heads=2, layers=2, vocabulary=64)
VISION, TEXT = 60, SHAPE.text_tokens


@pytest.fixture(scope="module")
def costs():
    calls = []
    found = run_decode_bench(
        SHAPE, batch=3, vision=VISION, budgets=(0.5, 0.2), rounds=2, progress=lambda *seen: calls.append(seen)
    )
    assert calls[-1][0] == calls[-1][1] == len(calls)
    return {cost.method: cost for cost in found}


def test_every_way_is_there(costs):
    budgets = [f"{way} {b}" for b in (0.5, 0.2) for way in ("masked", "keep", "core")]
    assert list(costs) == [STOCK, ATTENTIONS, OURS, PACKED, *budgets]
    for cost in costs.values():
        assert cost.step_ms > 0
        assert cost.attention_ms > 0
        assert cost.speedup_low <= cost.speedup <= cost.speedup_high
        assert (cost.batch, cost.vision, cost.layers, cost.rounds) == (3, VISION, 2, 2)
    assert costs[STOCK].speedup == 1.0


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
    """Dense and stock agree; a mask and its timed twin agree; the rest differ from stock."""
    model = random_model(SHAPE)
    inputs = prompt(model, SHAPE, vision=VISION)
    hidden = torch.arange(5, 50)

    def filled(name, **options):
        runner = Runner(name, model, inputs, 2, **options)
        runner.fill()
        return runner

    stock = filled("stock")
    twin = Runner("twin", model, inputs, 2, hidden=hidden)
    twin.filled_as(stock)
    masked = filled("masked", hidden=hidden)
    plain = logits_of(stock, REFRESH)
    torch.testing.assert_close(logits_of(filled("dense", policy=DENSE), REFRESH), plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_of(masked, REFRESH), logits_of(twin, REFRESH))
    for other in (filled("mask", hidden=hidden), filled("keep", policy=Policy(vision_keep=0.1))):
        assert not torch.allclose(logits_of(other, REFRESH), plain, atol=1e-4)
    # after steps, timed or not, the sequences are equally long
    masked.attention_steps(3)
    assert masked.cache.get_seq_length() == 1 + VISION + TEXT + REFRESH + 3
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_the_clock_adds_up_what_it_wraps():
    clock = Clock(torch.device("cpu"))
    assert clock.around(lambda a, b=1: a + b)(2, b=3) == 5
    first = clock.seconds
    assert first > 0
    with pytest.raises(ZeroDivisionError):
        clock.around(lambda: 1 / 0)()
    assert clock.seconds > first


def test_bad_numbers_are_refused():
    for options in ({"rounds": 0}, {"batch": 0}, {"budgets": (0.0,)}):
        with pytest.raises(UserError, match="a decode bench needs"):
            run_decode_bench(SHAPE, **options)
    with pytest.raises(UserError, match="GiB are free"):
        run_decode_bench(SHAPE, batch=1 << 22, layers=1)
