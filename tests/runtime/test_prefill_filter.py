"""Tokens dropped on the way through the layers: which, how many, on which models, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AttentionInterface

import avlprof
from avlprof.errors import UserError
from avlprof.policy import JointPool, Policy, PrefillFilter, ScorerSpec, TextPolicy, sizes
from avlprof.testing.families import families
from avlprof.testing.models import cases, random_llava
from avlprof.testing.types import tiny_inputs, tiny_model, vision_ids
from tests.helpers import few, generate, one_row
from tests.oracle import NEAR_TIE, Oracle

MODELS = dict(cases())
FAMILIES = dict(families())
SLIDING_BEHIND = ("internvl_gpt_oss", "gemma3", "aya_vision", "paligemma2")
ONE = Policy(vision_keep=0.5, prefill_filter=(PrefillFilter(after_layer=1, keep=0.6),))
PYRAMID = Policy(
    vision_keep=(0.9, 0.6, 0.25),
    vision_compute=(0.3, 0.3, 0.1),
    refresh_interval=3,
    text=TextPolicy(window=6, sink=1),
    prefill_filter=(PrefillFilter(after_layer=1, keep=0.7), PrefillFilter(after_layer=2, keep=0.3)),
)


@contextlib.contextmanager
def counted(model):
    """Tokens that each decoder layer is handed, a list a forward."""
    found, handles = [], []

    def note(index, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            found.append([])
        found[-1].append(states.shape[1])

    for index, layer in enumerate(model.get_decoder().layers):
        hook = lambda module, args, kwargs, index=index: note(index, args, kwargs)  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def test_later_layers_are_handed_fewer_tokens():
    case = random_llava()
    inputs = case.inputs(seed=2, text=11)
    with avlprof.apply(case.model, PYRAMID), counted(case.model) as found:
        generate(case.model, inputs, steps=4)
    prompt, vision = inputs["input_ids"].shape[1], 25
    assert found[0] == [prompt, prompt - vision + int(0.7 * vision), prompt - vision + int(0.3 * vision)]
    assert found[1:] == [[1, 1, 1]] * 3


def test_rows_that_keep_fewer_are_padded():
    """Rows with 0, 1 and 2 pictures behind one filter: as long as the longest row, no longer."""
    case = random_llava()
    batch = case.inputs(batch=3, seed=2, pad=True, text=15, images_per_row=[1, 0, 2])
    with avlprof.apply(case.model, PYRAMID) as runtime, counted(case.model) as found:
        together = generate(case.model, batch, steps=12, suppress_tokens=[2])
    rows = runtime.cache.rows
    for layer, keep in ((1, 0.7), (2, 0.3)):
        left = [row.total - row.vision + int(keep * row.vision + 1e-6) for row in rows]
        assert found[0][layer] == max(left)
    width = batch["input_ids"].shape[1]
    for row in range(3):
        answer = together.sequences[row, width:].tolist()
        logits, trace = Oracle(case.model, PYRAMID, (2,)).run(one_row(case, batch, row), answer[:-1])
        assert trace.gap > NEAR_TIE
        ours = torch.stack([step[row] for step in together.logits])
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", few([name for name in FAMILIES if name not in SLIDING_BEHIND], ["llava_next", "qwen3_vl"])
)
@pytest.mark.parametrize("policy", [ONE, PYRAMID])
def test_families(name, policy):
    case = FAMILIES[name]()
    types = {"token_type_ids": 1} if name == "paligemma" else {}
    for seed in range(3, 9):
        inputs = case.inputs(seed=seed, text=13)
        with avlprof.apply(case.model, policy) as runtime:
            ours = generate(case.model, inputs, steps=8, suppress_tokens=list(case.vision_token_ids))
        answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits, trace = Oracle(case.model, policy, case.vision_token_ids, types).run(inputs, answer[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=1e-4, rtol=1e-4)
    for index, layer in enumerate(runtime.cache.layers):
        wanted = sizes(policy, runtime.cache.rows[0], 3)[index]
        plan = layer.plans[0]
        assert (plan.system, plan.vision, plan.core) == (wanted.system, wanted.vision, wanted.core)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_one_length_that_the_filter_makes_uneven(attention):
    """No padding at first, so sdpa needs no mask; behind the filter it does."""
    case = random_llava()
    one, two = case.inputs(seed=1, text=34), case.inputs(seed=2, text=9, images_per_row=2)
    assert one["input_ids"].shape == two["input_ids"].shape
    batch = {name: torch.cat([one[name], two[name]]) for name in one}
    case.model.set_attn_implementation({"text_config": attention})
    with avlprof.apply(case.model, ONE):
        together = generate(case.model, batch, steps=6)
    case.model.set_attn_implementation({"text_config": "sdpa"})
    for row, single in enumerate((one, two)):
        answer = together.sequences[row, one["input_ids"].shape[1] :].tolist()
        logits, _ = Oracle(case.model, ONE, (2,)).run(single, answer[:-1])
        ours = torch.stack([step[row] for step in together.logits])
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)


@contextlib.contextmanager
def columns_hidden(model, hidden, first):
    """Stock attention in which nobody looks at columns `hidden` from layer `first` on."""
    stock = AttentionInterface._global_mapping["sdpa"]

    def attend(module, query, key, value, mask, **options):
        if getattr(module, "layer_idx", None) is not None and module.layer_idx >= first:
            visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
            visible[:, hidden] = False
            mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)[None, None]
        return stock(module, query, key, value, mask, **options)

    AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", stock)


@pytest.mark.parametrize(("name", "after"), [("gemma4:whole", 2), ("llava", 1)])
def test_what_a_layer_gets_besides_its_states_is_cut_too(name, after):
    """Inputs of each layer, which Gemma 4 hands over by position."""
    model = tiny_model(name)
    inputs = tiny_inputs(model, seed=3)
    vision = torch.isin(inputs["input_ids"][0], torch.tensor(vision_ids(model))).nonzero()[:, 0]
    scorer = ScorerSpec(name="position")
    policy = Policy(scorer=scorer, prefill_filter=(PrefillFilter(after_layer=after, keep=0.5),))
    with torch.inference_mode(), avlprof.apply(model, policy), counted(model) as found:
        ours = model(**inputs).logits[0, -1]
    width, dropped = inputs["input_ids"].shape[1], len(vision) - len(vision) // 2
    assert found[0][after:] == [width - dropped] * (len(found[0]) - after)
    gone = vision[:dropped]  # the newest stay
    with torch.inference_mode(), columns_hidden(model, gone, after):
        theirs = model(**inputs).logits[0, -1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "after", "message"),
    [
        ("gemma4", 1, "needs full attention from the layer before it on"),
        ("qwen3_5", 1, "a state of fixed size"),
        ("minimax_m3_vl:sparse", 1, "an index of its own"),
        ("granite4_vision", 1, "must be 3 or more"),
    ],
)
def test_models_that_cannot_be_filtered(name, after, message):
    policy = Policy(prefill_filter=(PrefillFilter(after_layer=after, keep=0.6),))
    with pytest.raises(UserError, match=message), avlprof.apply(tiny_model(name), policy):
        pass


def test_a_filter_that_keeps_all_is_none():
    case = MODELS["qwen2_5_vl-6q2kv"]()
    inputs = case.inputs(batch=2, seed=3, pad=True)
    stock = generate(case.model, inputs, steps=6)
    policy = Policy(prefill_filter=(PrefillFilter(after_layer=1, keep=1.0),))
    with avlprof.apply(case.model, policy):
        ours = generate(case.model, inputs, steps=6)
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(stock.logits), atol=1e-4, rtol=1e-4)


def test_the_model_is_left_without_hooks():
    case = random_llava()
    layers = case.model.get_decoder().layers
    with avlprof.apply(case.model, ONE):
        assert [len(layer._forward_pre_hooks) for layer in layers] == [0, 1, 1]
    with pytest.raises(RuntimeError, match="stop"), avlprof.apply(case.model, ONE):
        raise RuntimeError("stop")
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_what_cannot_be_filtered_is_refused_in_a_sentence():
    for name in ("gemma3", "aya_vision"):
        case = FAMILIES[name]()
        with pytest.raises(UserError, match="a window of tokens"), avlprof.apply(case.model, ONE):
            pass
        assert not any(layer._forward_pre_hooks for layer in case.model.get_decoder().layers)
    case = FAMILIES["qwen3_vl"]()
    case.model.config.vision_config.deepstack_visual_indexes = [0, 1]
    with pytest.raises(UserError, match="must be 2 or more"), avlprof.apply(case.model, ONE):
        pass
    case = random_llava()
    joint = Policy(
        pool="joint",
        joint=JointPool(keep=0.5),
        scorer=ScorerSpec(name="position"),
        prefill_filter=ONE.prefill_filter,
    )
    with (
        pytest.raises(UserError, match="prefill_filter beside pool: joint"),
        avlprof.apply(case.model, joint),
    ):
        pass
    with avlprof.apply(case.model, ONE), avlprof.record(case.model):
        with pytest.raises(UserError, match="cannot be recorded"):
            generate(case.model, case.inputs(), steps=2)
