"""Captured steps that outlive a call: later prompts replay them, and nobody's cache is written over."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import avlprof
from avlprof.attention.session import cache_of, switched, with_cache
from avlprof.policy import DENSE, Policy, TextPolicy
from avlprof.runtime.layout import RowPlan
from avlprof.runtime.windows import Extents, rounded
from avlprof.testing.families import families
from avlprof.testing.models import cases, random_llava
from tests.helpers import FEW, few, generate, thinned
from tests.policies import CORE, KEEP, LED, POLICIES, SCORED

MODELS, FAMILIES = dict(cases()), dict(families())
REPLAYED = ("dense", *sorted(set(POLICIES) - SCORED))
AHEAD = 24
REFRESHED = Policy(vision_keep=KEEP, vision_compute=CORE, refresh_interval=4)


@pytest.fixture(scope="module", params=few(MODELS, ("qwen2_5_vl-6q2kv",)))
def case(request):
    return MODELS[request.param]()


def prompts(case, batch=3):
    """Batches of nearby lengths, padded; pictures of seeds 7 and 12 have the same sizes."""
    return [
        case.inputs(batch=batch, seed=seed, pad=True, text=text, images_per_row=[1, 0, 2][:batch])
        for seed, text in ((7, 15), (12, 15), (12, 12), (7, 17))
    ]


def answered(case, inputs, options):
    """Tokens and logits of an answer, without the cache that comes with them."""
    found = generate(case.model, inputs, **options)
    return found.sequences, torch.stack(found.logits)


def assert_like_plain(case, policy, batches, captures=None, **options):
    """Answers of captured steps, one prompt behind the other, are those of ordinary steps.

    `captures` are numbers of captures of all batches; None: as many as of the first one alone.
    """
    found = []
    with avlprof.apply(case.model, policy) as runtime:
        plain = [(*answered(case, inputs, options), runtime.cache.use()) for inputs in batches]
    with avlprof.apply(case.model, policy, captured=AHEAD) as runtime:
        for inputs in batches:
            found.append((*answered(case, inputs, options), runtime.cache.use(), runtime.captures))
    for (said, logits, mine, _), (tokens, wanted, its) in zip(found, plain, strict=True):
        assert torch.equal(said, tokens)
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-5)
        assert [(u.prompt, u.live, u.read, u.steps) for u in mine] == [
            (u.prompt, u.live, u.read, u.steps) for u in its
        ]
    assert found[-1][-1] in (captures or [found[0][-1]])


@pytest.fixture(autouse=True)
def without_gc():
    """Whether a cache is gone must not wait for the collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "name",
    thinned(
        REPLAYED,
        ("dense", "core and window", "per head", "packed", "packed core", "packed text"),
        ("dense", "core and window", "packed core"),
    ),
)
def test_later_prompts_replay_what_the_first_one_captured(case, name):
    assert_like_plain(case, DENSE if name == "dense" else POLICIES[name], prompts(case))


@pytest.mark.parametrize("name", thinned(LED, ("at every step", "packed")))
def test_layers_follow_others_from_prompt_to_prompt(case, name):
    assert_like_plain(case, LED[name], prompts(case))


def test_a_prompt_that_reaches_further_is_told_as_far():
    """Its vision lies beyond all that the first prompt had seen when its steps were captured."""
    case = random_llava()
    policy = LED["at every step"].model_copy(update={"vision_keep": 0.4, "vision_compute": 0.2})
    assert_like_plain(case, policy, [case.inputs(seed=1), case.inputs(seed=1, images_per_row=2)])


@pytest.mark.parametrize("family", thinned(FAMILIES, FEW, ("qwen3_vl",)))
def test_of_every_family(family):
    case = FAMILIES[family]()
    if "sliding_attention" in (getattr(case.model.config.get_text_config(), "layer_types", None) or []):
        pytest.skip("layers with a sliding window cannot be captured")
    batches = [case.inputs(batch=2, seed=seed, pad=True, text=text) for seed, text in ((1, 9), (1, 7))]
    for policy in (DENSE, REFRESHED):
        assert_like_plain(case, policy, batches)


def test_pictures_of_other_sizes_stand_in_the_same_buckets_or_in_others(case):
    batches = [case.inputs(batch=2, seed=seed, pad=True) for seed in (7, 8, 9)]
    assert_like_plain(case, POLICIES["core, k=3"], batches, captures=range(2, 7, 2))


def test_beams_are_replayed_too(case):
    batches = [case.inputs(batch=2, pad=True, seed=seed) for seed in (2, 3)]
    assert_like_plain(case, POLICIES["core and window"], batches, captures=[2], num_beams=3)


def test_a_full_window_needs_no_mask_and_is_replayed():
    case = random_llava()
    policy = Policy(vision_keep=0.5, text=TextPolicy(window=5, sink=2))
    assert_like_plain(case, policy, [case.inputs(seed=1), case.inputs(seed=2)], captures=[1])


@pytest.mark.full  # two answers of 100 steps, six times captured
def test_a_long_answer_grows_through_buckets_that_the_next_one_knows():
    case = random_llava()
    inputs = case.inputs()
    with avlprof.apply(case.model, REFRESHED) as runtime:
        plain = generate(case.model, inputs, 100).sequences
    with avlprof.apply(case.model, REFRESHED, captured=5) as runtime:
        found, counts = [], []
        for _ in range(2):
            found.append(generate(case.model, inputs, 100).sequences)
            counts.append(runtime.captures)
    assert all(torch.equal(plain, one) for one in found)
    assert counts[0] == counts[1] > 3


def answer_on(case, cache, ids, steps=6):
    """Logits of some more tokens on a cache."""
    logits = []
    with torch.no_grad():
        for _ in range(steps):
            logits.append(case.model(input_ids=ids, **with_cache(case.model, cache)).logits)
            ids = logits[-1][:, -1:].argmax(dim=-1)
    return torch.cat(logits, dim=1)


def begun(case, runtime, inputs):
    """A prompt's cache and first token, and three steps behind it."""
    cache = runtime.new_cache()
    with torch.no_grad():
        first = case.model(**inputs, **with_cache(case.model, cache)).logits[:, -1:].argmax(dim=-1)
    return cache, answer_on(case, cache, first, 3)[:, -1:].argmax(dim=-1)


@pytest.mark.parametrize("ahead", [4, 64])
def test_a_cache_that_is_still_held_stays_as_it_is(ahead):
    """Two conversations in turn, then each goes on; a third begins when the first is gone."""
    case = random_llava()
    inputs = [case.inputs(seed=seed) for seed in (1, 2, 3)]
    found = []
    for captured in (None, ahead):
        with avlprof.apply(case.model, REFRESHED, captured=captured) as runtime:
            one, first = begun(case, runtime, inputs[0])
            other, second = begun(case, runtime, inputs[1])
            logits = [answer_on(case, one, first), answer_on(case, other, second)]
            logits += [answer_on(case, one, first), answer_on(case, other, second)]
            del one
            third = begun(case, runtime, inputs[2])
            logits += [answer_on(case, *third), answer_on(case, other, second)]
            found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


def test_outputs_that_are_kept_hold_their_caches():
    case = random_llava()
    with avlprof.apply(case.model, REFRESHED, captured=AHEAD) as runtime:
        said = [generate(case.model, case.inputs(seed=seed)) for seed in (1, 2, 3)]
        caches = [cache_of(one) for one in said]
        storages = {layer.keys.data_ptr() for cache in caches for layer in cache.layers}
        assert len(storages) == 3 * len(caches[0].layers)
        counted = runtime.captures
        del said, caches
        generate(case.model, case.inputs(seed=4))
        assert runtime.captures == counted


@pytest.mark.full  # a capture for each of ten lengths
def test_memory_is_bounded_and_released():
    case = random_llava()
    with avlprof.apply(case.model, REFRESHED, captured=8) as runtime:
        generate(case.model, case.inputs())
        size = runtime.buckets.bytes
        assert size >= sum(use.allocated for use in runtime.cache.use()) > 0
        live = runtime.cache.use()
        runtime.release()
        assert runtime.buckets.bytes == 0
        assert runtime.cache.use() == live
    for bound in (0, 3 * size):
        with avlprof.apply(case.model, REFRESHED, captured=8, kept_bytes=bound) as runtime:
            for text in range(10, 300, 70):
                generate(case.model, case.inputs(text=text), 4)
                idle = runtime.buckets.bytes - sum(use.allocated for use in runtime.cache.use())
                assert idle <= bound
            counted = runtime.captures
            generate(case.model, case.inputs(text=text), 4)
            assert runtime.captures == counted  # the latest one is there in any case
        assert runtime.buckets.bytes == 0


def test_steps_go_on_after_a_release_and_are_captured_anew():
    case = random_llava()
    found = []
    for captured in (None, AHEAD):
        with avlprof.apply(case.model, REFRESHED, captured=captured) as runtime:
            cache, ids = begun(case, runtime, case.inputs())
            before = runtime.captures
            runtime.release()
            found.append(answer_on(case, cache, ids))
            assert (runtime.captures > before) == (captured is not None)
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


def test_a_copy_of_a_cache_goes_its_own_way():
    """Replays of one answer leave the other alone."""
    case = random_llava()
    found = []
    for captured in (None, AHEAD):
        with avlprof.apply(case.model, REFRESHED, captured=captured) as runtime:
            cache, ids = begun(case, runtime, case.inputs())
            copied = copy.deepcopy(cache)
            with switched(case.model) as session:
                session.adopt(copied, torch.zeros(1, cache.get_seq_length(), dtype=torch.int8))
            logits = [answer_on(case, one, ids) for one in (copied, cache, copied)]
            found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


def test_modes_of_torch_may_change_between_calls():
    """What was made in inference mode could not be written to outside of it."""
    case = random_llava()
    inputs = case.inputs()
    with avlprof.apply(case.model, REFRESHED, captured=AHEAD) as runtime:
        with torch.inference_mode():
            first = generate(case.model, inputs).sequences.clone()
        assert torch.equal(generate(case.model, inputs).sequences, first)
        counted = runtime.captures
        cache = runtime.new_cache()
        logits = case.model(**inputs, **with_cache(case.model, cache)).logits  # with gradients
        assert logits.requires_grad
        with torch.inference_mode():
            assert torch.equal(generate(case.model, inputs).sequences, first)
        assert runtime.captures <= 2 * counted


def test_other_weights_are_captured_anew():
    case = random_llava()
    inputs = case.inputs()
    layer = case.model.get_decoder().layers[1].self_attn
    with avlprof.apply(case.model, REFRESHED, captured=AHEAD) as runtime:
        generate(case.model, inputs)
        counted = runtime.captures
        own = layer.o_proj.weight
        layer.o_proj.weight = torch.nn.Parameter(-own.detach().clone())
        found = generate(case.model, inputs)
        assert runtime.captures == 2 * counted
    with avlprof.apply(case.model, REFRESHED):
        wanted = generate(case.model, inputs)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("contexts", [(AHEAD, None), (None, AHEAD), (AHEAD, AHEAD, None, AHEAD)])
def test_a_cache_goes_on_in_contexts_that_capture_and_that_do_not(contexts):
    case = random_llava()
    found = []
    for kinds in (contexts, [None] * len(contexts)):
        logits, cache = [], None
        for captured in kinds:
            with avlprof.apply(case.model, REFRESHED, captured=captured) as runtime:
                if cache is None:
                    cache, ids = begun(case, runtime, case.inputs())
                with switched(case.model) as session:
                    length = cache.get_seq_length()
                    session.adopt(cache, torch.zeros(1, length, dtype=torch.int8))
                logits.append(answer_on(case, cache, ids))
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


@pytest.mark.full  # eight answers
def test_a_turn_on_a_kept_cache_and_the_next_conversation():
    case = random_llava()
    first, second = case.inputs(seed=1), case.inputs(seed=2)
    found, captures = [], []
    for captured in (None, AHEAD):
        with avlprof.apply(case.model, POLICIES["core and window"], captured=captured) as runtime:
            for _ in range(2):
                cache = runtime.new_cache()
                said = generate(case.model, first, **with_cache(case.model, cache)).sequences
                ids = torch.cat([said, second["input_ids"]], dim=1)
                going_on = dict(second, input_ids=ids, attention_mask=torch.ones_like(ids))
                found.append(generate(case.model, going_on, **with_cache(case.model, cache)).sequences)
                captures.append(runtime.captures)
                del cache
    assert all(torch.equal(found[0], one) for one in found[1:])
    assert captures[2] == captures[3]


# --- lengths


def test_lengths_are_rounded_by_little():
    for count in range(1, 40_000, 7):
        assert 0 <= rounded(count) - count <= max(31, count / 16)
        assert rounded(rounded(count)) == rounded(count)
        assert rounded(count) <= rounded(count + 1)
    assert rounded(0) == 0


def test_extents_hold_what_they_are_asked_for():
    plans = [RowPlan(3, 70, 20, 9, 0, None), RowPlan(4, 60, 20, 9, 0, None)]
    found = Extents.of(plans, [9, 12], [44, 44], True)
    assert (found.left, found.near, found.text) == (96, 32, 44)
    assert found.masked == (True, True)
    assert found.core == (32, 32, False)
    exact = Extents.of([RowPlan(4, 60, 28, 9, 0, 9)], [9], [9], True)
    assert (exact.left, exact.near, exact.masked, exact.core) == (64, 32, (False, False), (32, 32, False))
    assert Extents.of([RowPlan(4, 28, 28, 9, 0, 9)], [8], [9], False).masked == (True, False)
