"""The trace bench: its shapes are those of the models, its numbers belong to the right method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from avlprof.bench import memory, trace
from avlprof.bench.memory import peak_above
from avlprof.bench.shapes import (
    CUSTOM,
    IMAGE,
    SHAPES,
    decoder_shape,
    prompt,
    random_model,
)
from avlprof.bench.trace import METHODS, median_interval, run_trace_bench
from avlprof.errors import UserError
from tests.watching import Counted

SMALL = {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 60}


def small(name="tiny"):
    return decoder_shape(name, **SMALL)


def parameters(shape):
    """Weights of the decoder, its embedding and its head, by hand."""
    grouped = shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden * (shape.hidden + grouped) + 3 * shape.hidden * shape.intermediate
    return shape.layers * layer + 2 * shape.vocabulary * shape.hidden


@pytest.mark.parametrize(
    ("name", "billions"), [("llava-1.5-7b", 6.74), ("llava-next-7b", 6.74), ("qwen2.5-vl-7b", 7.61)]
)
def test_named_shapes_have_the_published_sizes(name, billions):
    assert parameters(decoder_shape(name)) / 1e9 == pytest.approx(billions, abs=0.01)


def test_tiny_is_the_embedded_model(tiny):
    config = tiny.model.config
    text, shape = config.text_config, SHAPES["tiny"]
    theirs = (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads)
    assert theirs == (shape.hidden, shape.intermediate, shape.layers, shape.heads)
    assert (text.num_key_value_heads, text.vocab_size) == (shape.kv_heads, shape.vocabulary)
    assert config.image_seq_length == shape.vision_tokens


@pytest.mark.parametrize("name", [*SHAPES, CUSTOM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_every_shape_runs(name, dtype):
    shape = small(name)
    model = random_model(shape, layers=1, dtype=dtype, seed=1)
    decoder = model.get_decoder()
    assert len(decoder.layers) == 1
    assert {p.dtype for p in decoder.parameters()} == {dtype}
    of_layers = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)
    assert of_layers == parameters(decoder_shape(name, **SMALL | {"layers": 1})) - 2 * 60 * 32
    inputs = prompt(model, shape, vision=21, text=5, system=2, batch=2)
    assert inputs["input_ids"].shape == (2, 28)
    assert (inputs["input_ids"] == IMAGE).sum(dim=1).tolist() == [21, 21]
    logits = model(**inputs).logits.float()
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert torch.get_default_dtype() == torch.float32


def test_bad_shapes_are_refused():
    with pytest.raises(UserError, match=r"did you mean llava-1\.5-7b"):
        decoder_shape("llava-1.5-7")
    with pytest.raises(UserError, match="did you mean heads"):
        decoder_shape("tiny", head=4)
    with pytest.raises(UserError, match="multiples of kv_heads"):
        decoder_shape("tiny", heads=5)
    with pytest.raises(UserError, match="layers of shape 'tiny' must be at least 1, got 0"):
        decoder_shape("tiny", layers=0)
    with pytest.raises(UserError, match="needs sizes"):
        decoder_shape(CUSTOM)
    with pytest.raises(UserError, match=r"layers must be in \[1, 6\]"):
        random_model(decoder_shape("tiny"), layers=7)


def test_a_bench_of_every_method(monkeypatch):
    """One row a length and method; methods take turns; the clock is read around each."""
    order, watch = [], Counted()
    real = trace._prefill

    def watched(method, *args):
        order.append(method)
        real(method, *args)

    monkeypatch.setattr(trace, "_prefill", watched)
    costs = run_trace_bench(small(), [40, 64], rounds=3, watch=watch)
    assert [(c.tokens, c.method) for c in costs] == [(n, m) for n in (40, 64) for m in METHODS]
    assert {(c.shape, c.layers, c.device, c.dtype, c.rounds, c.note) for c in costs} == {
        ("tiny", 2, "cpu", "float32", 3, "")
    }
    for cost in costs:
        assert cost.seconds > 0
        assert 0 < cost.ratio_low <= cost.ratio <= cost.ratio_high
        if cost.method == "plain":
            assert cost.ratio == cost.ratio_low == cost.ratio_high == 1
            assert cost.extra_bytes in (0, None)
    timed = order[8:20]
    assert [timed[i] for i in (0, 4, 8)] == [METHODS[1], METHODS[2], METHODS[3]], "rounds begin with another"
    assert all(set(timed[i : i + 4]) == set(METHODS) for i in (0, 4, 8))
    assert watch.calls[-1] == (32, 32)


def test_ratios_are_of_one_round(monkeypatch):
    """A slow stretch of the machine hits both of a round, and leaves their ratio as it is."""
    seconds = {"plain": iter([1.0, 10.0, 2.0]), "traced": iter([1.5, 14.0, 4.0])}
    monkeypatch.setattr(trace, "_prefill", lambda *args: None)
    monkeypatch.setattr(trace, "_timed", lambda method, *args: next(seconds[method]))
    plain, traced = run_trace_bench(small(), [40], rounds=3, methods=("plain", "traced"))
    assert plain.seconds == 2.0
    assert traced.seconds == 4.0
    assert (traced.ratio, traced.ratio_low, traced.ratio_high) == pytest.approx((1.5, 1.4, 2.0))


def test_eager_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(trace, "free_bytes", lambda device: 4 * 40 * 40 * 4 * 2)
    found = {c.method: c for c in run_trace_bench(small(), [40], rounds=1)}
    assert "left out: its weights take" in found["eager"].note
    assert math.isnan(found["eager"].ratio)
    assert found["eager"].peak_bytes is None
    assert found["traced"].rounds == 1


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([17], {}, "lengths must be at least 18"),
        ([], {}, "lengths must be"),
        ([40], {"rounds": 0}, "needs a round"),
        ([40], {"methods": ("traced",)}, "plain among methods"),
        ([40], {"methods": ("plain", "fast")}, "plain, fast"),
    ],
)
def test_bad_benches_are_refused(lengths, options, message):
    with pytest.raises(UserError, match=message):
        run_trace_bench(small(), lengths, **options)


def test_peak_memory_counts_what_lives_together(capfd):
    """What is freed before the peak is not in it, nor what lived before; views are not counted twice."""
    device, held = torch.device("cpu"), [torch.ones(50 << 20, dtype=torch.uint8)]

    def work():
        torch.ones(30 << 20, dtype=torch.uint8)
        held.append(torch.ones(8 << 20, dtype=torch.uint8))
        both = [torch.zeros(10 << 20, dtype=torch.uint8) for _ in range(3)]
        held.append(held.pop()[: 1 << 20])
        del both

    assert peak_above(device, work) == (8 + 30) << 20
    assert peak_above(device, lambda: None) == 0
    assert memory.free_bytes(device) > 0
    assert capfd.readouterr().err == ""


def test_median_with_its_interval():
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (2.0, 1.0, 3.0)
    values = np.random.default_rng(0).normal(1.0, 0.1, 400)
    median, low, high = median_interval(values)
    assert low < median < high
    error = 1.253 * 0.1 / math.sqrt(400)  # of the median of normal numbers
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.25)
    assert all(math.isnan(value) for value in median_interval(np.array([])))
