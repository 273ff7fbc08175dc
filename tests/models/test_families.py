"""Every family through the generic adapter: small random models, against stock, oracle and eager."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import DynamicCache, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

import avlprof
from avlprof.attention.modality import MODALITIES
from avlprof.attention.session import switched, with_cache
from avlprof.errors import UserError
from avlprof.models import adapter_for
from avlprof.models.aliases import ALIASES, is_tested
from avlprof.policy import DENSE, Policy, TextPolicy
from avlprof.runtime.cache import AVLCache
from avlprof.runtime.forced import ForcedBatch
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.scorers import Prefill
from avlprof.testing.adapters import FamilyConformance, decoder_inputs
from avlprof.testing.families import families
from avlprof.testing.models import cases
from avlprof.tracing import RecordOptions, record
from tests.helpers import FEW, few, generate_words, stepwise, thinned
from tests.oracle import NEAR_TIE, Oracle
from tests.policies import PLAIN

FAMILIES = dict(families())
FILMING = {name: build for name, build in (*cases(), *families()) if build().videos is not None}
ANSWER_TYPES = {"paligemma": {"token_type_ids": 1}, "paligemma2": {"token_type_ids": 1}}
STEPS = 8


@cache
def built(name):
    return FAMILIES[name]()


@pytest.fixture(params=thinned(FAMILIES, FEW, ("qwen3_vl", "gemma3")))
def case(request):
    return built(request.param)


def oracle(case, policy):
    types = {"token_type_ids": 0} | ANSWER_TYPES.get(case.name, {})
    return Oracle(case.model, policy, case.vision_token_ids, types)


def test_keep_all_is_the_stock_model(case):
    inputs = case.inputs(2, seed=3, pad=True, text=13)
    assert not inputs["attention_mask"].all()
    stock = generate_words(case, inputs, STEPS)
    for policy in (DENSE, Policy(vision_keep=1.0, text=TextPolicy(window=500))):
        with avlprof.apply(case.model, policy):
            ours = generate_words(case, inputs, STEPS)
        for a, b in zip(ours.logits, stock.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            top = b.topk(2).values
            if not torch.equal(a.argmax(-1), b.argmax(-1)):
                assert (top[:, 0] - top[:, 1]).min() < 1e-3
                break


@pytest.mark.parametrize("name", thinned(FAMILIES, FEW))
def test_keep_all_is_bit_equal_in_bf16(name):
    case = FAMILIES[name]()
    case.model.to(torch.bfloat16)
    inputs = case.inputs(2, seed=5, pad=True)
    stock = generate_words(case, inputs, steps=5)
    with avlprof.apply(case.model, DENSE):
        ours = generate_words(case, inputs, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(stock.logits, ours.logits, strict=True))


@pytest.mark.parametrize("name", few(PLAIN, ["accumulated and window"]))
def test_agrees_with_the_dense_oracle(case, name):
    policy = PLAIN[name]
    for seed in range(11, 16):
        inputs = case.inputs(1, seed=seed, text=13, images_per_row=2)
        with avlprof.apply(case.model, policy) as runtime:
            ours = generate_words(case, inputs, steps=14)
        answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits, trace = oracle(case, policy).run(inputs, answer[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE, "near-ties decide the sets of every seed"
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=1e-4, rtol=1e-4)
    for index, layer in enumerate(runtime.cache.layers):
        if isinstance(layer, AdaptiveLayer):
            kept, core = layer.vision_positions(0)
            assert [set(row.tolist()) for row in kept] == trace.kept[index]
            assert [set(row.tolist()) for row in core] == trace.cores[index][-1]


@pytest.mark.parametrize("name", few(PLAIN, 1))
def test_left_padding_changes_nothing_under_a_policy(case, name):
    inputs = case.inputs(1, seed=12, text=13)
    length = inputs["input_ids"].shape[1]
    padded = {
        key: torch.nn.functional.pad(value, (5, 0), value=0) if value.shape == (1, length) else value
        for key, value in inputs.items()
    }
    found = []
    for batch in (inputs, padded):
        with avlprof.apply(case.model, PLAIN[name]) as runtime:
            found.append(torch.cat(generate_words(case, batch, steps=14).logits))
        assert runtime.cache.rows[0].total == length
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_the_policy_matters(case):
    """A guard of the tests above: what they evict would be missed."""
    inputs = case.inputs(1, seed=11, text=13, images_per_row=2)
    stock = generate_words(case, inputs, STEPS).logits[1]
    with avlprof.apply(case.model, PLAIN["core"]):
        assert (generate_words(case, inputs, STEPS).logits[1] - stock).abs().max() > 0.02


def eager(case, inputs):
    """Weights `[B, H, N, N]` of every layer; the logits must be those of the model as loaded."""
    stock = case.model(**inputs).logits
    before = case.model.config.get_text_config()._attn_implementation
    case.model.set_attn_implementation({"text_config": "eager"})
    try:
        out = case.model(**inputs, output_attentions=True)
    finally:
        case.model.set_attn_implementation({"text_config": before})
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[shown], stock[shown], atol=1e-4, rtol=1e-4)
    return out.attentions


@torch.no_grad()
def test_recorded_mass_is_that_of_eager_weights(case):
    """Every row of every prompt, tokens that attend to later ones included."""
    check_recorded_mass(case, case.inputs(2, seed=7, pad=True, text=11, images_per_row=[2, 1]))


FRAMES_ARE_PICTURES = ("internvl", "internvl_gpt_oss", "smolvlm")


def film_pixels(case, inputs):
    """The name of the tensor that holds the frames."""
    name = "pixel_values" if case.name in FRAMES_ARE_PICTURES else "pixel_values_videos"
    assert name in inputs
    return name


def filmed(case, seed, text=11):
    """Two rows of one and two videos, pictures beside them where the family's model takes both."""
    images = 0 if case.name in ("glm4v", *FRAMES_ARE_PICTURES) else [1, 0]
    return case.inputs(2, seed=seed, pad=True, text=text, images_per_row=images, videos_per_row=[1, 2])


@pytest.mark.parametrize("name", few(FILMING, 1))
@torch.no_grad()
def test_recorded_mass_of_videos_is_that_of_eager_weights(name):
    case = FILMING[name]()
    inputs = filmed(case, seed=7)
    assert film_pixels(case, inputs)
    check_recorded_mass(case, inputs)


@pytest.mark.parametrize("name", few(FILMING, 1))
def test_videos_carry_the_film_under_a_policy_as_the_oracle_says(name):
    case = FILMING[name]()
    policy = PLAIN["core"]
    for seed in range(11, 16):
        inputs = case.inputs(1, seed=seed, text=13, images_per_row=0, videos_per_row=2)
        with avlprof.apply(case.model, policy):
            ours = generate_words(case, inputs, steps=14)
        answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits, trace = oracle(case, policy).run(inputs, answer[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE, "near-ties decide the sets of every seed"
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=1e-4, rtol=1e-4)
    pixels = film_pixels(case, inputs)
    other = inputs | {pixels: inputs[pixels].flip(0, -1)}
    with avlprof.apply(case.model, policy):
        changed = generate_words(case, other, steps=1)
    assert (changed.logits[0] - ours.logits[0]).abs().max() > 0.02


def check_recorded_mass(case, inputs):
    wanted = eager(case, inputs)
    with record(case.model, RecordOptions(rows="all", per_head=True)) as recorder:
        case.model(**inputs)
    for row, found in enumerate(recorder.records):
        frame = pd.DataFrame(found.frame()).set_index(["query", "layer", "head"]).sort_index()
        shown = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][shown]
        vision = torch.isin(ids, torch.tensor(case.vision_token_ids))
        first = int(vision.nonzero()[0])
        system = torch.arange(len(ids)) < first
        columns = dict(zip(MODALITIES, (system, vision, ~vision & ~system), strict=False))
        queries = columns | {"last": torch.arange(len(ids)) == len(ids) - 1}
        for layer, weights in enumerate(wanted):
            weights = weights[row][:, shown][:, :, shown]
            for query, rows in queries.items():
                own = frame.loc[(query, layer)]
                for name, taken in columns.items():
                    mass = weights[:, rows][:, :, taken].sum(dim=-1).mean(dim=1)
                    np.testing.assert_allclose(own[f"mass_{name}"].to_numpy(), mass, atol=1e-5)
                rest = 1.0 - weights[:, rows].sum(dim=-1).mean(dim=1)
                np.testing.assert_allclose(own["mass_learned_sink"].to_numpy(), rest, atol=1e-5)


def test_recorded_steps_are_those_of_eager_weights(case):
    inputs = case.inputs(2, seed=9, pad=True, text=11)
    with record(case.model) as recorder:
        ours = generate_words(case, inputs, STEPS)
    before = case.model.config.get_text_config()._attn_implementation
    case.model.set_attn_implementation({"text_config": "eager"})
    try:
        out = generate_words(case, inputs, STEPS, output_attentions=True)
    finally:
        case.model.set_attn_implementation({"text_config": before})
    assert torch.equal(ours.sequences, out.sequences)
    vision = torch.isin(inputs["input_ids"], torch.tensor(case.vision_token_ids))
    for row, found in enumerate(recorder.records):
        decoded = found.scores()["decode"]
        assert len(decoded) == STEPS - 1
        for step, layers in enumerate(out.attentions[1:]):
            for layer, weights in enumerate(layers):
                full = torch.zeros(vision.shape[1] + step + 1)
                full[-weights.shape[-1] :] = weights[row, :, 0].mean(dim=0)
                wanted = full[: vision.shape[1]][vision[row]]
                np.testing.assert_allclose(decoded[step, layer], wanted, atol=1e-5)


@torch.no_grad()
def test_scorers_see_the_attention_that_the_layer_ran(case):
    inputs = case.inputs(2, seed=8, pad=True, text=11, images_per_row=[2, 1])
    wanted = eager(case, inputs)
    shown = inputs["attention_mask"].bool()
    every = torch.arange(shown.shape[1]).expand(2, -1)
    found = []

    class Watcher:
        def begin(self, forward):
            """Nothing to prepare."""

        def attended(self, forward, call):
            found.append(Prefill.of(call, forward.modality).weights(every))

    with switched(case.model, observers=(Watcher(),)):
        case.model(**inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        for row, real in enumerate(shown):
            torch.testing.assert_close(ours[row][:, real], theirs[row][:, real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(PLAIN))
def test_forced_is_the_stepwise_runtime(case, name):
    inputs = case.inputs(2, seed=21, pad=True, text=11)
    generator = torch.Generator().manual_seed(5)
    answers = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in (17, 11)]
    ours = ForcedBatch(case.model, inputs, answers).logits(PLAIN[name])
    theirs = stepwise(case.model, inputs, answers, PLAIN[name])
    for row, answer in enumerate(answers):
        a, b = ours[row, : len(answer) - 1], theirs[row, : len(answer) - 1]
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_without_token_types_the_prefix_attends_both_ways():
    """PaliGemma without them has no mask, and yet is not causal; eager would run it causally."""
    case = built("paligemma")
    inputs = case.inputs(2, seed=6)
    del inputs["token_type_ids"]
    every = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
    seen = []

    class Watcher:
        def begin(self, forward):
            """Nothing to prepare."""

        def attended(self, forward, call):
            assert call.mask is None
            size = call.query.shape[1] // call.key.shape[1]
            key, value = (t.repeat_interleave(size, dim=1) for t in (call.key, call.value))
            logits = call.query.double() @ key.double().mT * call.scaling
            seen.append(logits.softmax(-1))
            torch.testing.assert_close(
                (seen[-1] @ value.double()).transpose(1, 2).float(), call.stock(), atol=1e-5, rtol=1e-4
            )
            ours = Prefill.of(call, forward.modality).weights(every)
            torch.testing.assert_close(ours.double(), seen[-1], atol=1e-5, rtol=1e-4)

    with record(case.model) as recorder, switched(case.model, observers=(Watcher(),)):
        case.model(**inputs)
    assert len(seen) == 3
    for row, found in enumerate(recorder.records):
        vision = inputs["input_ids"][row] == case.vision_token_ids[0]
        wanted = torch.stack([weights[row, :, -1][:, vision].mean(dim=0) for weights in seen])
        np.testing.assert_allclose(found.scores()["last"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "attention"), [("paligemma", "sdpa"), ("paligemma", "eager"), ("paligemma2", "eager")]
)
def test_without_token_types_keep_all_is_the_stock_model(name, attention):
    """The two implementations differ here, and each is kept as it is."""
    case = built(name)
    inputs = case.inputs(1, seed=6)
    del inputs["token_type_ids"]
    before = case.model.config.get_text_config()._attn_implementation
    case.model.set_attn_implementation({"text_config": attention})
    try:
        stock = generate_words(case, inputs, STEPS)
        with avlprof.apply(case.model, DENSE), record(case.model) as recorder:
            ours = generate_words(case, inputs, STEPS)
        if attention == "eager":
            wanted = torch.stack(case.model(**inputs, output_attentions=True).attentions)[:, 0, :, -1]
    finally:
        case.model.set_attn_implementation({"text_config": before})
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(stock.logits), atol=1e-4, rtol=1e-4)
    if attention == "eager":
        vision = inputs["input_ids"][0] == case.vision_token_ids[0]
        last = wanted[:, :, vision].mean(dim=1).detach()
        np.testing.assert_allclose(recorder.records[0].scores()["last"], last, atol=1e-5)


SLIDING = [name for name in FAMILIES if adapter_for(built(name).model).sliding_layers]


@pytest.mark.parametrize("name", SLIDING)
@torch.no_grad()
def test_sliding_layers_are_left_as_they_are(name):
    case = built(name)
    sliding = adapter_for(case.model).sliding_layers
    inputs = case.inputs(2, seed=4, pad=True, text=11)
    stock = DynamicCache(config=case.model.config.get_text_config())
    case.model(**inputs, **with_cache(case.model, stock))
    with avlprof.apply(case.model, Policy(vision_keep=0.3)) as runtime:
        case.model(**inputs, use_cache=True)
    governed = {use.layer for use in runtime.cache.use()}
    assert governed == set(range(len(stock.layers))) - set(sliding)
    first = runtime.cache.layers[0]
    assert 0 in sliding
    assert isinstance(first, DynamicSlidingWindowLayer)
    assert torch.equal(first.keys, stock.layers[0].keys)
    assert torch.equal(first.values, stock.layers[0].values)


def test_sliding_families_are_among_them():
    assert set(SLIDING) == {"gemma3", "aya_vision", "paligemma2", "internvl_gpt_oss"}


def test_a_model_of_sliding_layers_alone_has_nothing_for_a_policy():
    config = MistralConfig(num_hidden_layers=2, sliding_window=9)
    with pytest.raises(UserError, match="every layer attends by a sliding window"):
        AVLCache(DENSE, config)


class TestConformance(FamilyConformance):
    @pytest.fixture(autouse=True, params=list(FAMILIES))
    def family(self, request):
        vars(self)["case"] = built(request.param)

    def test_vision_tokens_carry_the_picture(self):
        """A newline token stands among the vision tokens and carries none of the picture."""
        newline = getattr(self.case.model.model, "image_newline", None)
        if newline is None:
            super().test_vision_tokens_carry_the_picture()
            return
        inputs = self.case.inputs(1, seed=2)
        other = dict(inputs, pixel_values=inputs["pixel_values"].flip(0, -1))
        first, second = (decoder_inputs(self.case.model, self.adapter, batch) for batch in (inputs, other))
        changed = (first != second).any(dim=-1)
        vision = self.adapter.vision_mask(inputs["input_ids"])
        rows = 3  # of patches in a tile; the two tiles lie side by side
        assert int((vision & ~changed).sum()) == rows
        assert (first[vision & ~changed] == newline).all()
        assert not (changed & ~vision).any()


GRIDS = {
    "vipllava": [(5, 5)],
    "llava_next": [(3, 3), (3, 6)],
    "llava_onevision": [(3, 3), (3, 6)],
    "qwen2_vl": [(5, 4)],
    "qwen3_vl": [(5, 4)],
    "glm4v": [(5, 4)],
    "mistral3": [(5, 4)],
    "gemma3": [(4, 4)],
    "paligemma": [(5, 5)],
    "paligemma2": [(5, 5)],
}


def test_grids_are_those_of_the_pictures(case):
    """Families whose cut needs the size of the picture have none without it."""
    layout = adapter_for(case.model).image_layout(case.inputs(1, seed=1))
    found = None if layout is None else [(tile.rows, tile.columns) for tile in layout.tiles]
    assert found == GRIDS.get(case.name)


@torch.no_grad()
def test_a_grid_lies_row_after_row():
    """A change in the upper right corner of a picture changes one token of it: the end of a row."""
    case = built("mistral3")
    adapter = adapter_for(case.model)
    inputs = case.inputs(1, seed=1)
    (tile,) = adapter.image_layout(inputs).tiles
    rows, columns = tile.rows, tile.columns
    projector, caught = case.model.model.multi_modal_projector, []
    handle = projector.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    case.model(**inputs)
    handle.remove()
    patches, side = caught[0].clone(), 2 * columns
    patches[side - 2] += 1  # a patch of the upper right square of four
    sizes = inputs["image_sizes"]
    changed = (projector(caught[0], sizes) != projector(patches, sizes)).any(dim=-1)
    assert changed.nonzero()[:, 0].tolist() == [columns - 1]
    assert len(changed) == rows * columns


def test_families_are_marked_as_tested():
    models = [build().model for _, build in (*cases(), *families())]
    run = {model.config.model_type for model in models}
    assert run == {alias.family for alias in ALIASES.values() if is_tested(alias.family)}


def specials(case):
    """What is special of a model, read off the model itself."""
    config, text = case.model.config, case.model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    layers = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", 0))
    adapter = adapter_for(case.model)
    inputs = case.inputs(1, seed=1)
    layout = adapter.image_layout(inputs)
    others = [adapter.image_layout(case.inputs(1, seed=seed, pad=True)) for seed in range(8)]
    grids = {other.tiles[0].rows for other in others if other is not None}
    facts = {
        "tiles": layout is None or len(layout.tiles) > 1,
        "newline tokens": layout is not None and any(tile.stride > tile.columns for tile in layout.tiles),
        "own grid": len(grids) > 1,
        "video": case.videos is not None,
        "mrope": "mrope_section" in rope,
        "deepstack": hasattr(config.vision_config, "deepstack_visual_indexes"),
        "several features": isinstance(layers, list | tuple) and len(layers) > 1,
        "sliding layers": bool(adapter.sliding_layers),
        "soft cap": getattr(text, "attn_logit_softcapping", None) is not None,
    }
    seen = torch.stack(eager(case, inputs)).amax(dim=(0, 1, 2))
    ahead = seen.triu(1) > 0
    vision = torch.isin(inputs["input_ids"][0], torch.tensor(case.vision_token_ids))
    facts["two-way prefix"] = bool(ahead[~vision].any())
    facts["two-way pictures"] = bool(ahead.any()) and not facts["two-way prefix"]
    return {name for name, holds in facts.items() if holds}


ALIAS_OF = {"paligemma": "paligemma", "paligemma2": "paligemma2"}
WITHOUT_ALIAS = ("internvl_gpt_oss",)


@torch.no_grad()
def test_what_the_table_calls_special_is_so_and_nothing_else(case):
    if case.name in WITHOUT_ALIAS:
        return
    named = [
        alias
        for name, alias in ALIASES.items()
        if alias.family == case.model.config.model_type and ALIAS_OF.get(case.name, name) == name
    ]
    assert named
    for alias in named:
        assert set(alias.special) == specials(case)


def test_builders_repeat_and_differ_by_seed():
    for build in FAMILIES.values():
        state = torch.random.get_rng_state()
        first, second = build(), build()
        assert torch.equal(state, torch.random.get_rng_state())
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
