"""Parts of a decoder that are compiled for captured steps, against the models' own code."""

from __future__ import annotations

import functools
import logging
import operator
import shutil
from collections import Counter

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import avlprof
from avlprof.policy import DENSE, Policy
from avlprof.runtime.fused import FusedParts, with_global
from avlprof.runtime.graph import Recording
from avlprof.testing.families import families
from avlprof.testing.models import cases, random_llava
from tests.helpers import few, generate, thinned

FAMILIES = dict(families()) | dict(cases())
REFRESHED = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=3)
AHEAD = 24


class Counting:
    """A backend that runs graphs as they are, and counts compilations and runs."""

    def __init__(self):
        self.compiled = self.runs = 0

    def __call__(self, module, inputs):
        self.compiled += 1

        def run(*args):
            self.runs += 1
            return module.forward(*args)

        return run


COUNTING = Counting()
torch._dynamo.register_backend(compiler_fn=COUNTING, name="counting")


@pytest.fixture(autouse=True)
def counting():
    torch._dynamo.reset()
    COUNTING.compiled = COUNTING.runs = 0
    yield COUNTING
    torch._dynamo.reset()


def in_place(model):
    """Modules of the decoder whose forward call is not their own."""
    return [module for module in model.get_decoder().modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", thinned(FAMILIES, list(FAMILIES), ("qwen3_vl", "aya_vision")))
def test_every_part_compiles_without_a_break(family, counting):
    """Halves of layers, rotations, norms of queries; logits as before, sliding layers' too."""
    case = FAMILIES[family]()
    inputs = case.inputs(batch=2, seed=3, pad=True)
    parts = FusedParts(case.model, "counting")
    with torch.no_grad():
        wanted = case.model(**inputs).logits
        with parts.in_place():
            found = case.model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert not parts.refused
    assert any("Norm" in name for name in parts.names)
    assert any(name.endswith("MLP") for name in parts.names)
    assert any(name.endswith("apply_rotary_pos_emb") for name in parts.names)
    layers = case.model.get_decoder().layers
    norms = sum("norm" in name for layer in layers for name, _ in layer.self_attn.named_children())
    still = layers[1:2] if family == "aya_vision" else []  # a layer of Cohere's that turns nothing
    added = family == "qwen3_vl"  # vision features behind the first layer, so the next norms anew
    # what comes before the first attention call, behind each, and inside: rotations and norms
    assert counting.runs == 1 + 2 * len(layers) - len(still) + norms + added
    assert counting.compiled <= 6  # first half, middle and last layers, rotations, two kinds of norms
    assert not in_place(case.model)


@pytest.mark.parametrize("policy", [DENSE, REFRESHED], ids=["dense", "refreshed"])
def test_replays_run_what_was_compiled_and_prompts_do_not(policy, counting):
    case = random_llava()
    inputs, layer = case.inputs(batch=2, pad=True), case.model.get_decoder().layers[0]
    places = []
    hook = layer.register_forward_hook(lambda module, args, _: places.append(args[0].shape[1] == 1))
    found = []
    try:
        for fused in (False, "counting"):
            with avlprof.apply(case.model, policy, captured=AHEAD, fused=fused) as runtime:
                said = generate(case.model, inputs, 6).sequences  # else its cache would keep the buffers
                assert not in_place(case.model)
                before, steps = counting.runs, runtime.captures
                again = generate(case.model, inputs, 6)
                assert runtime.captures == steps
            assert torch.equal(said, again.sequences)
            found.append(torch.stack(again.logits))
            # a rotation and what is behind attention in three layers, and the first norm, in five steps
            assert counting.runs - before == ((2 * 3 + 1) * 5 if fused else 0)
    finally:
        hook.remove()
    assert places.count(False) == 4
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


def test_another_context_compiles_nothing_again(counting):
    case = random_llava()
    compiled = []
    for _ in range(2):
        with avlprof.apply(case.model, REFRESHED, captured=AHEAD, fused="counting"):
            generate(case.model, case.inputs(), 6)
        compiled.append(counting.compiled)
    assert compiled[0] == compiled[1] > 0


def test_nothing_is_compiled_on_a_cpu_unless_told(counting):
    case = random_llava()
    with avlprof.apply(case.model, REFRESHED, captured=AHEAD):
        generate(case.model, case.inputs(), 6)
    with avlprof.apply(case.model, REFRESHED, fused="counting"):  # no captured steps to fuse
        generate(case.model, case.inputs(), 6)
    assert counting.compiled == 0


@pytest.mark.full  # four answers, six captures
def test_recorders_and_beams_meet_fused_steps(counting):
    case = random_llava()
    found = []
    for fused in (False, "counting"):
        with avlprof.apply(case.model, REFRESHED, captured=AHEAD, fused=fused):
            with avlprof.record(case.model) as recorder:
                said = generate(case.model, case.inputs(), 8)
            beams = generate(case.model, case.inputs(), 8, num_beams=2)
        found.append((said.sequences, beams.sequences, recorder.records[0].scores()["decode"]))
    assert counting.runs > 0
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(*(torch.from_numpy(one[2]) for one in found), atol=1e-5, rtol=1e-5)


def test_modules_are_as_they_were_after_an_error():
    case = random_llava()
    parts = FusedParts(case.model, "counting")

    def interrupted():
        with parts.in_place():
            assert len(in_place(case.model)) == 2 * 3 + 1  # layers, their attention, the last norm
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not in_place(case.model)


def operators(model, parts=None):
    """How often a call for one token runs each operator in the open."""
    token = {"input_ids": torch.tensor([[5], [6]]), "use_cache": False}
    token["attention_mask"] = torch.ones(2, 1, 1, 1, dtype=torch.bool)  # else made in the call, by values
    with parts.in_place() if parts else torch.no_grad():
        model(**token)
        with Recording() as recording:
            logits = model(**token).logits
    nodes = recording.finished((logits,)).__self__.graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


@pytest.mark.parametrize("family", few(["llava_next", "glm4v", "aya_vision"], quick=1))
def test_residual_additions_are_no_operators_of_their_own(family):
    """Layers of two norms, of four, and of attention and feed-forward part side by side."""
    model = FAMILIES[family]().model
    layers = model.get_decoder().layers
    halves, parts = FusedParts(model, "eager"), FusedParts(model, "eager")
    parts.refused[type(layers[0]).__name__] = "for comparison"
    one, other = operators(model, halves), operators(model, parts)
    assert other - one == {"aten.add.Tensor": 2 * len(layers)}
    assert set(one - other) <= {str(operator.getitem)}  # a half gives several tensors
    assert set(parts.refused) == {type(layers[0]).__name__}
    assert not halves.refused


def test_layers_share_what_is_compiled(counting):
    """Nine layers take what three do: what is before the first, between two, behind the last, a rotation."""
    config = MistralConfig(
        num_hidden_layers=9,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
    )
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(0, 40, (2, 3))
    with torch.no_grad():
        wanted = model(ids).logits
        with FusedParts(model, "counting").in_place():
            found = model(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert counting.compiled == 4
    assert counting.runs == 1 + 2 * 9


def test_states_that_change_between_layers_are_normed_anew(counting):
    """As vision features are added in place behind the first layers, in an inference mode too."""
    case = random_llava()
    inputs, layers = case.inputs(batch=2), case.model.get_decoder().layers

    def added(module, args, output):
        output[:, -1] += 1

    def another(module, args, output):
        return output * 2

    handles = [layers[0].register_forward_hook(added), layers[1].register_forward_hook(another)]
    parts = FusedParts(case.model, "counting")
    try:
        with torch.inference_mode():
            wanted = case.model(**inputs).logits
            with parts.in_place():
                found = case.model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert counting.runs == 1 + 2 * 3 + 2  # two norms that were worked out for other states


def test_answers_in_an_inference_mode_are_the_same(counting):
    case = random_llava()
    found = []
    for fused in (False, "counting"):
        with torch.inference_mode(), avlprof.apply(case.model, REFRESHED, captured=AHEAD, fused=fused):
            found.append(generate(case.model, case.inputs(), 6).sequences)
            before = counting.runs
            found.append(generate(case.model, case.inputs(), 6).sequences)
    assert counting.runs - before == (2 * 3 + 1) * 5
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("own", ["forward", "hook"])
def test_a_layer_whose_child_is_changed_goes_by_parts(own, counting):
    """What a module does beside its code is left alone, and its neighbours are compiled."""
    case = random_llava()
    inputs, layers = case.inputs(batch=2), case.model.get_decoder().layers
    mlp = layers[1].mlp
    if own == "forward":
        mlp.forward = lambda states: states * 0
    else:
        mlp.register_forward_hook(lambda module, args, output: output * 0)
    parts = FusedParts(case.model, "counting")
    with torch.no_grad():
        wanted = case.model(**inputs).logits
        with parts.in_place():
            found = case.model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert not parts.refused
    # three rotations; two halves of layer 0; two norms of layer 1, and with a hook its mlp; two of layer 2
    assert counting.runs == 3 + 2 + (2 if own == "forward" else 3) + 2
    assert in_place(case.model) == ([mlp] if own == "forward" else [])


class Asking(LlamaDecoderLayer):
    """A layer whose code asks for values, so it cannot be cut."""

    def forward(self, hidden_states, **kwargs):
        if hidden_states.sum() > 1e9:
            return hidden_states
        return super().forward(hidden_states, **kwargs)


class Doubting(LlamaDecoderLayer):
    """A layer whose code asks for the kind of a value."""

    def forward(self, hidden_states, **kwargs):
        states = super().forward(hidden_states, **kwargs)
        return states[0] if isinstance(states, tuple) else states


class Reading(LlamaDecoderLayer):
    """A layer that reads what its attention module holds."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + 0 * self.self_attn.o_proj.weight.sum()


@pytest.mark.parametrize("kind", [Asking, Doubting, Reading])
def test_a_layer_that_cannot_be_cut_goes_by_parts_and_is_told_once(kind, caplog, counting):
    case = random_llava()
    inputs = case.inputs(batch=2)
    for layer in case.model.get_decoder().layers:
        layer.__class__ = kind
    parts = FusedParts(case.model, "counting")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "avlprof"):
        wanted = case.model(**inputs).logits
        with parts.in_place():
            found = case.model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert counting.runs == 4 * 3 + 1
    assert list(parts.refused) == [kind.__name__]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("avlprof")]
    assert len(told) == 1
    assert told[0].startswith(f"{kind.__name__} is fused without its residual additions in captured steps: ")


class Talking(nn.Module):
    """What no compiler takes as a whole."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        torch._dynamo.graph_break()
        return self.inner(states)


def test_what_does_not_compile_stays_as_it_is_and_is_told_once(caplog, counting):
    case = random_llava()
    with avlprof.apply(case.model, REFRESHED, captured=AHEAD):
        wanted = generate(case.model, case.inputs(), 6).sequences
    for layer in case.model.get_decoder().layers:
        layer.mlp = Talking(layer.mlp)
    with (
        caplog.at_level(logging.WARNING, "avlprof"),
        avlprof.apply(case.model, REFRESHED, captured=AHEAD, fused="counting"),
    ):
        assert torch.equal(generate(case.model, case.inputs(), 6).sequences, wanted)
    told = [record.getMessage() for record in caplog.records if "not fused" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("Talking is not fused in captured steps: ")
    assert counting.runs > 0  # the norms


@torch._dynamo.register_backend(name="broken")
def broken(module, inputs):
    """A backend whose code does not run."""

    def run(*args):
        raise RuntimeError("no kernel image is available")

    return run


def test_what_compiles_and_does_not_run_stays_as_it_is(caplog):
    case = random_llava()
    found = []
    with caplog.at_level(logging.WARNING, "avlprof"):
        for fused in (False, "broken"):
            with avlprof.apply(case.model, REFRESHED, captured=AHEAD, fused=fused):
                found.append(generate(case.model, case.inputs(), 6).sequences)
    assert torch.equal(*found)
    assert sum("no kernel image" in record.getMessage() for record in caplog.records) == 3


def test_a_function_finds_another_global_through_its_wrappers():
    def wrapped(function):
        @functools.wraps(function)
        def outer(*args, **kwargs):
            return [function(*args, **kwargs)]

        return outer

    @wrapped
    @wrapped
    def answer(*, of=nn.Linear):
        return nn.Module, of

    copy = with_global(answer, "nn", type("other", (), {"Module": "changed"}))
    assert copy() == [[("changed", nn.Linear)]]
    assert answer() == [[(nn.Module, nn.Linear)]]


@pytest.mark.slow  # Inductor compiles C++, a minute on a busy core
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_gives_the_same_answers(dtype):
    case = FAMILIES["qwen2_5_vl-6q2kv"]()
    model = case.model.to(dtype)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in case.inputs(batch=2, seed=1, pad=True).items()
    }
    found = []
    for fused in (False, True):
        with avlprof.apply(model, REFRESHED, captured=AHEAD, fused=fused):
            found.append(generate(model, inputs, 12))
    plain, fast = (torch.stack(one.logits).float() for one in found)
    if dtype == torch.float32:
        assert torch.equal(found[0].sequences, found[1].sequences)
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(fast[:2], plain[:2], atol=0.05, rtol=0.05)
