"""The logit lens against transformers' own hidden states, norm and head, family by family."""

from __future__ import annotations

import types
from functools import cache

import numpy as np
import pytest
import torch

from avlprof.errors import UserError
from avlprof.models import adapter_for
from avlprof.models.adapter import Adapter
from avlprof.testing.families import families
from avlprof.testing.models import cases
from avlprof.testing.types import tiny_inputs, tiny_model
from avlprof.tracing import lens
from avlprof.tracing.lens import find_readout, read_vision
from tests.helpers import few, one_row, thinned

BUILDERS = {**dict(cases()), **dict(families())}
PICTURED = ("llava-4q2kv", "qwen2_5_vl-6q2kv", "llava_next", "qwen3_vl", "idefics3", "gemma3", "paligemma")
TESTED = ("llava-4q2kv", "qwen2_5_vl-6q2kv", "qwen3_vl", "gemma3")
TYPES = {
    "granite_docling": "scaled",
    "mistral_large4": "capped",
    "muse_spark": "scaled and capped",
    "nemotron_h_omni": "a head of a part",
    "janus": "a generate of its own",
    "llava:gpt_oss": "sinks",
}
TOP = 4


@cache
def case_of(name):
    return BUILDERS[name]()


def reader(model):
    """What `read_vision` asks of a loaded model."""
    return types.SimpleNamespace(adapter=adapter_for(model, None), model=model)


def states(model, inputs):
    """What each layer hands on, `[rows, tokens, width]`: what transformers reports, the last one unnormed."""
    decoder, last = Adapter(model).decoder, []
    hook = decoder.layers[-1].register_forward_hook(
        lambda module, args, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    hook.remove()
    return [*out.hidden_states[1:-1], last[0]], out


def oracle(model, hidden, vision):
    """Probabilities of a row's vision tokens, `[vision, vocabulary]`, in fp64, by the names of modules."""
    decoder, text = Adapter(model).decoder, model.config.get_text_config()
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.norm_f
    head = model.lm_head if hasattr(model, "lm_head") else model.language_model.lm_head
    with torch.no_grad():
        logits = head(norm(hidden[0][vision])).double()
    logits = logits * getattr(text, "output_multiplier", 1.0)
    if model.config.model_type == "granite_docling":
        logits = logits / text.logits_scaling
    cap = getattr(text, "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits).softmax(dim=-1)


def check(spoken, wanted):
    """The likeliest tokens and their probabilities; ties within rounding may stand in any order."""
    best = wanted.topk(TOP, dim=-1).values
    torch.testing.assert_close(torch.from_numpy(spoken[1]).double(), best, atol=2e-5, rtol=1e-3)
    own = wanted.gather(1, torch.from_numpy(spoken[0]).long())
    torch.testing.assert_close(own, best, atol=2e-5, rtol=1e-3)


def check_model(model, inputs):
    loaded = reader(model)
    readout = find_readout(loaded.adapter, inputs)
    (spoken,) = read_vision(loaded, inputs, readout, readout.layers, TOP)
    vision = loaded.adapter.vision_mask(inputs["input_ids"])[0]
    hidden, out = states(model, inputs)
    assert readout.layers == tuple(range(len(hidden)))
    assert spoken.ids.shape == spoken.shares.shape == (len(hidden), int(vision.sum()), TOP)
    for layer, own in enumerate(hidden):
        check((spoken.ids[layer], spoken.shares[layer]), oracle(model, own, vision))
    given = out.logits[0][vision].double().softmax(dim=-1)  # behind the last layer it is the model itself
    check((spoken.ids[-1], spoken.shares[-1]), given)
    return readout


@pytest.mark.parametrize("name", thinned(PICTURED, TESTED, TESTED[:1]))
def test_every_layer_of_a_family(name):
    case = case_of(name)
    check_model(case.model, case.inputs(seed=3))


@pytest.mark.parametrize("name", thinned(TYPES, ("mistral_large4", "muse_spark"), ()))
def test_heads_of_other_kinds(name):
    model = tiny_model(name)
    readout = check_model(model, tiny_inputs(model, seed=1))
    what = TYPES[name]
    assert ("scaled" in what) == (readout.scale != 1.0)
    assert ("capped" in what) == (readout.cap is not None)


@pytest.mark.parametrize("name", few(("llava-4q2kv", "qwen2_5_vl-6q2kv"), 1))
def test_a_row_of_a_padded_batch_says_what_it_says_alone(name, monkeypatch):
    case = case_of(name)
    loaded = reader(case.model)
    batch = case.inputs(batch=3, seed=2, pad=True)
    readout = find_readout(loaded.adapter, case.inputs(seed=0))
    together = read_vision(loaded, batch, readout, readout.layers, TOP)
    monkeypatch.setattr(lens, "BLOCK", 1)  # one state at a time
    for row, spoken in enumerate(together):
        (alone,) = read_vision(loaded, one_row(case, batch, row), readout, readout.layers, TOP)
        np.testing.assert_allclose(spoken.shares, alone.shares, atol=1e-5)
        assert (spoken.ids == alone.ids).mean() > 0.98  # ties apart


def test_chosen_layers_alone(monkeypatch):
    case = case_of("llava-4q2kv")
    loaded, inputs = reader(case.model), case.inputs()
    readout = find_readout(loaded.adapter, inputs)
    (whole,) = read_vision(loaded, inputs, readout, readout.layers, 2)
    last = readout.layers[-1]
    (some,) = read_vision(loaded, inputs, readout, (last, 0), 2)
    np.testing.assert_array_equal(some.ids, whole.ids[[last, 0]])


def test_logits_exist_for_vision_tokens_alone_and_block_by_block(monkeypatch):
    case = case_of("llava-4q2kv")
    loaded, inputs = reader(case.model), case.inputs()
    readout = find_readout(loaded.adapter, inputs)
    vision, sizes = int(loaded.adapter.vision_mask(inputs["input_ids"]).sum()), []
    monkeypatch.setattr(lens, "BLOCK", 3 * 4 * readout.vocabulary)
    hook = readout.head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:-1]))
    read_vision(loaded, inputs, readout, (0,), 1)
    hook.remove()
    assert sum(size[0] for size in sizes if len(size) == 1) == vision
    assert max(size[0] for size in sizes if len(size) == 1) == 3


REFUSED = {
    "gemma3n": "hand on [4, 1, 27, 128] for 27 tokens, not one state a token",
    "inkling_mm_model": "between its last layer and its head is not known",
}


@pytest.mark.parametrize("name", thinned(REFUSED, ["gemma3n"], []))
def test_what_has_no_lens_says_so(name):
    model = tiny_model(name)
    with pytest.raises(UserError, match="layer") as error:
        find_readout(adapter_for(model, None), tiny_inputs(model))
    assert REFUSED[name] in str(error.value)


def test_unknown_logits_are_refused():
    case = random_model()

    def bent(module, args, options, out):
        out.logits = out.logits.abs().sqrt()
        return out

    case.model.register_forward_hook(bent, with_kwargs=True)
    with pytest.raises(UserError, match="does to the logits of its head is not known"):
        find_readout(adapter_for(case.model, None), case.inputs())


def random_model():
    return BUILDERS["llava-4q2kv"]()


@pytest.mark.full  # a model of its own
def test_layers_that_skip_the_prompt_are_left_out():
    """Behind shared keys and values only the last token of a prompt goes on, where there is a cache."""
    model = tiny_model("gemma4:shared")
    loaded, inputs = reader(model), tiny_inputs(model)
    readout = find_readout(loaded.adapter, inputs)
    assert 0 < len(readout.layers) < loaded.adapter.layers
    (spoken,) = read_vision(loaded, inputs, readout, readout.layers, 1)
    assert len(spoken.ids) == len(readout.layers)
    with pytest.raises(UserError, match="hands on no state of each token"):
        read_vision(loaded, inputs, readout, (loaded.adapter.layers - 1,), 1)


def test_states_that_are_not_finite_stop_it_and_nothing_is_left_behind():
    case = random_model()
    loaded, inputs = reader(case.model), case.inputs()
    readout = find_readout(loaded.adapter, inputs)

    def hooks():
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in case.model.modules())

    before = hooks()
    read_vision(loaded, inputs, readout, readout.layers, 1)
    with torch.no_grad():
        case.model.get_decoder().layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="hidden states of sample 'x' behind layer 1 are not finite"):
        read_vision(loaded, inputs, readout, readout.layers, 1, ["x"])
    assert hooks() == before
