"""Decoding steps that are captured and replayed, against the same steps run as ever."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch

import avlprof
from avlprof.attention.session import with_cache
from avlprof.errors import UserError
from avlprof.policy import DENSE, Policy
from avlprof.runtime.graph import capture
from avlprof.testing.families import families
from avlprof.testing.models import cases, random_llava
from avlprof.tracing.options import RecordOptions
from tests.helpers import FEW, few, generate, thinned
from tests.policies import CORE, KEEP, LED, POLICIES, SCORED

MODELS, FAMILIES = dict(cases()), dict(families())
REPLAYED = ("dense", *sorted(set(POLICIES) - SCORED))
AHEAD = 9  # captured anew twice in an answer


@pytest.fixture(scope="module", params=few(MODELS, ("qwen2_5_vl-6q2kv",)))
def case(request):
    return MODELS[request.param]()


def both(case, policy, inputs, ahead=AHEAD, **options):
    """The same answers without and with captured steps, and the two caches."""
    found = []
    for captured in (None, ahead):
        with avlprof.apply(case.model, policy, captured=captured) as runtime:
            found.append((generate(case.model, inputs, **options), runtime.cache))
    return found


def agree(found):
    (plain, cache), (replayed, other) = found
    assert torch.equal(plain.sequences, replayed.sequences)
    for a, b in zip(plain.logits, replayed.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert [(u.prompt, u.live, u.read, u.refreshes, u.steps) for u in cache.use()] == [
        (u.prompt, u.live, u.read, u.refreshes, u.steps) for u in other.use()
    ]


def same_sets(plain, replayed):
    for a, b in zip(plain.layers, replayed.layers, strict=True):
        for row in range(2):
            kept, core = a.vision_positions(row)
            assert [set(x.flatten().tolist()) for x in (kept, core)] == [
                set(x.flatten().tolist()) for x in b.vision_positions(row)
            ]
            texts = [set(layer.text_positions(row).flatten().tolist()) for layer in (a, b)]
            assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "name",
    thinned(
        REPLAYED,
        ("dense", "core and window", "filter", "packed", "packed core", "packed score only"),
        ("dense", "core and window", "packed", "packed core"),
    ),
)
def test_replayed_steps_are_the_same_steps(case, name):
    policy = DENSE if name == "dense" else POLICIES[name]
    inputs = case.inputs(batch=3, seed=7, pad=True, text=15, images_per_row=[1, 0, 2])
    agree(both(case, policy, inputs))


def test_kept_and_core_sets_are_the_same(case):
    inputs = case.inputs(batch=2, seed=4, pad=True)
    (_, plain), (_, replayed) = both(case, POLICIES["core and window"], inputs)
    same_sets(plain, replayed)


@pytest.mark.parametrize("name", LED)
def test_layers_follow_others_in_replayed_steps(case, name):
    inputs = case.inputs(batch=3, seed=7, pad=True, text=15, images_per_row=[1, 0, 2])
    found = both(case, LED[name], inputs)
    agree(found)
    same_sets(*(cache for _, cache in found))


@pytest.mark.parametrize("family", thinned(FAMILIES, FEW, ("qwen3_vl", "gemma3")))
def test_families_are_captured_or_refused(family):
    case = FAMILIES[family]()
    policy = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=3)
    sliding = "sliding_attention" in (getattr(case.model.config.get_text_config(), "layer_types", None) or [])
    inputs = case.inputs(batch=2, seed=1, pad=True)
    if sliding:
        with pytest.raises(UserError, match="sliding window or a state cannot be captured"):
            both(case, policy, inputs)
    else:
        agree(both(case, policy, inputs))


def test_a_step_runs_no_python_of_the_model_once_captured(case):
    """One capture of each kind of step, then replays alone."""
    calls = []
    layer = case.model.get_decoder().layers[0]
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    policy = Policy(vision_keep=KEEP, vision_compute=CORE, refresh_interval=4)
    try:
        with avlprof.apply(case.model, policy, captured=100):
            generate(case.model, case.inputs())
    finally:
        hook.remove()
    assert len(calls) == 1 + 2 * 3  # a capture runs a step twice before


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_samples(case, options):
    found = []
    for captured in (None, AHEAD):
        with avlprof.apply(case.model, POLICIES["core and window"], captured=captured):
            torch.manual_seed(5)
            found.append(generate(case.model, case.inputs(batch=2, pad=True, seed=2), **options).sequences)
    assert torch.equal(*found)


def test_a_further_turn_is_captured_anew():
    case = random_llava()
    first, second = case.inputs(seed=1), case.inputs(seed=2)
    found = []
    for captured in (None, 5):
        with avlprof.apply(case.model, POLICIES["core and window"], captured=captured) as runtime:
            cache = runtime.new_cache()
            said = generate(case.model, first, **with_cache(case.model, cache)).sequences
            ids = torch.cat([said, second["input_ids"]], dim=1)
            going_on = dict(second, input_ids=ids, attention_mask=torch.ones_like(ids))
            found.append(generate(case.model, going_on, **with_cache(case.model, cache)))
    assert torch.equal(found[0].sequences, found[1].sequences)


def test_a_loop_of_ones_own_needs_positions_only_where_they_have_axes(case):
    inputs, ids = case.inputs(), torch.full((1, 1), 7)
    found = []
    for captured in (None, 20):
        with avlprof.apply(case.model, POLICIES["window"], captured=captured) as runtime, torch.no_grad():
            cache = runtime.new_cache()
            case.model(**inputs, **with_cache(case.model, cache))
            if captured and case.model.config.get_text_config().rope_parameters.get("mrope_section"):
                with pytest.raises(UserError, match="need position_ids"):
                    case.model(input_ids=ids, **with_cache(case.model, cache))
                return
            steps = [case.model(input_ids=ids, **with_cache(case.model, cache)).logits for _ in range(6)]
            found.append(torch.cat(steps))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


def test_states_and_tuples_are_given_where_they_are_asked_for():
    case = random_llava()
    with avlprof.apply(case.model, DENSE, captured=20) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        given = with_cache(case.model, cache)
        case.model(**case.inputs(), **given)
        ids = torch.full((1, 1), 7)
        steps = [case.model(input_ids=ids, **given) for _ in range(3)]
        assert all("hidden_states" not in step for step in steps)
        states = case.model(input_ids=ids, output_hidden_states=True, **given).hidden_states
        assert len(states) == len(cache.layers) + 1
        assert isinstance(case.model(input_ids=ids, return_dict=False, **given), tuple)
        assert cache.get_seq_length() == case.inputs()["input_ids"].shape[1] + 5


def recorded(case, policy, inputs, captured, options, prompts=1):
    """Tables and scores of all rows of some prompts, and how many steps were captured."""
    with avlprof.apply(case.model, policy, captured=captured) as runtime:
        with avlprof.record(case.model, options) as recorder:
            for _ in range(prompts):
                generate(case.model, inputs, 9)
            return [(record.frame(), record.scores()) for record in recorder.records], runtime.captures


def assert_recorded_alike(case, policy, inputs, options=None, kinds=1):
    (plain, none), (replayed, captures) = (
        recorded(case, policy, inputs, captured, options, prompts=2) for captured in (None, 40)
    )
    assert (none, captures) == (0, kinds)
    for (frame, scores), (other, others) in zip(plain, replayed, strict=True):
        assert len(frame) == len(other)
        for row, same in zip(frame, other, strict=True):
            assert row.keys() == same.keys()
            for name, value in row.items():
                if isinstance(value, str):
                    assert same[name] == value
                else:
                    np.testing.assert_allclose(
                        np.asarray(same[name], float), np.asarray(value, float), atol=1e-5, err_msg=name
                    )
        assert scores.keys() == others.keys()
        for name in scores:
            pair = (torch.from_numpy(values[name]) for values in (scores, others))
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def heard(name):
    """Whether replays are heard: not behind a filter, nor where a refresh changes what few bits store."""
    policy = DENSE if name == "dense" else POLICIES[name]
    return not policy.prefill_filter and not (policy.packs and policy.refresh_interval)


@pytest.mark.parametrize(
    "name", thinned(sorted(filter(heard, REPLAYED)), ("dense", "core, k=3", "score only"), ("core, k=3",))
)
def test_a_recorder_hears_replayed_steps(case, name):
    """In batches of rows that differ, with refreshes and text that goes."""
    policy = DENSE if name == "dense" else POLICIES[name]
    inputs = case.inputs(batch=3, seed=3, pad=True, text=15, images_per_row=[1, 2, 1])
    refreshed = policy.refresh_interval > 0 and policy.compute(3) != policy.keep(3)
    kinds = 1 if not refreshed or policy.refresh_interval == 1 else 2
    assert_recorded_alike(case, policy, inputs, RecordOptions(per_head=name == "score only"), kinds)


@pytest.mark.parametrize("family", thinned(FAMILIES, FEW, ("idefics3",)))
def test_recorders_of_families_hear_replayed_steps(family):
    case = FAMILIES[family]()
    if "sliding_attention" in (getattr(case.model.config.get_text_config(), "layer_types", None) or []):
        pytest.skip("layers with a sliding window cannot be captured")
    policy = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=3)
    assert_recorded_alike(case, policy, case.inputs(batch=2, seed=1, pad=True), kinds=2)


def test_recorders_come_and_go_between_captured_steps():
    """Each finds what it finds without capture, and steps that nobody hears keep no queries."""
    case = random_llava()
    policy, inputs = POLICIES["core, k=3"], case.inputs()
    found = []
    for captured in (None, 40):
        with avlprof.apply(case.model, policy, captured=captured) as runtime:
            said = [generate(case.model, inputs).sequences]
            with avlprof.record(case.model) as first:
                said.append(generate(case.model, inputs).sequences)
                with avlprof.record(case.model) as second:
                    said.append(generate(case.model, inputs).sequences)
            said.append(generate(case.model, inputs).sequences)
        assert runtime.captures == (0 if captured is None else 4)
        assert all(torch.equal(one, said[0]) for one in said)
        found.append([record.scores()["decode"] for record in [*first.records, *second.records]])
    assert len(found[0]) == 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), atol=1e-5, rtol=1e-5)


def test_the_model_is_as_it_was_also_after_an_error():
    case = random_llava()
    inputs = case.inputs()
    before = generate(case.model, inputs).sequences
    signature = inspect.signature(case.model.forward)

    def interrupted():
        with avlprof.apply(case.model, DENSE, captured=8):
            assert inspect.signature(case.model.forward) == signature
            generate(case.model, inputs)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "forward" not in vars(case.model)
    assert torch.equal(generate(case.model, inputs).sequences, before)


@pytest.mark.parametrize("name", ["paligemma", "llava_next"])
def test_a_loop_of_ones_own_begins_where_the_model_counts_from(name):
    case, logits = FAMILIES[name](), []
    inputs = case.inputs(1, seed=3)
    for captured in (None, 4):
        with (
            avlprof.apply(case.model, Policy(vision_keep=0.6), captured=captured) as runtime,
            torch.no_grad(),
        ):
            cache, steps = runtime.new_cache(), []
            out = case.model(**inputs, **with_cache(case.model, cache))
            for _ in range(3):
                token = out.logits[:, -1:].argmax(dim=-1)
                out = case.model(input_ids=token, **with_cache(case.model, cache))
                steps.append(out.logits)
        logits.append(torch.cat(steps))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "ahead", "said"),
    [
        (POLICIES["history"], 8, "evicts by score while decoding"),
        (POLICIES["tova"], 8, "evicts by score"),
        (POLICIES["scored core"], 8, "scores its core at every step"),
        (POLICIES["triggered"], 8, "refreshes when its steps say so"),
        (DENSE, 0, "at least 1 and at most 65,536, got 0"),
        (DENSE, 10**9, "at most 65,536, got 1000000000"),
        (DENSE, True, "got True"),
        (DENSE, 1.5, "captured must be the number of steps that one capture serves, .*, got 1.5"),
        (DENSE, "128", "got '128'"),
    ],
)
def test_what_cannot_be_captured_is_refused(policy, ahead, said):
    with pytest.raises(UserError, match=said), avlprof.apply(random_llava().model, policy, captured=ahead):
        pass


@pytest.mark.parametrize("kept", [-5, 1.5, "4GiB", None, False])
def test_bytes_that_are_kept_are_a_number(kept):
    model = random_llava().model
    with (
        pytest.raises(UserError, match=f"kept_bytes must be a whole number of bytes, .*, got {kept!r}"),
        avlprof.apply(model, DENSE, captured=8, kept_bytes=kept),
    ):
        pass


@pytest.mark.parametrize("captured", [None, 8])
@pytest.mark.parametrize("fused", [1, 0, "", "inducter", ["inductor"], "x" * 300])
def test_what_cannot_be_fused_is_refused(fused, captured):
    """`apply` takes no more than it says, also where nothing is captured."""
    said = re.escape("fused must be None, True, False or the name of a backend of torch.compile")
    with pytest.raises(UserError, match=said) as caught:
        avlprof.apply(random_llava().model, DENSE, captured=captured, fused=fused).__enter__()
    assert len(str(caught.value)) < 200


# --- replays themselves -----------------------------------------------------------------------


def test_a_replay_reads_what_tensors_hold_now_and_writes_where_it_wrote():
    torch.manual_seed(0)
    weight, state, given = torch.randn(5, 5), torch.zeros(4, 5), torch.randn(4, 5)

    def step():
        hidden = (given @ weight).softmax(dim=-1)
        top, where = hidden.topk(2, dim=-1)
        state.add_(hidden)[:, 1:].mul_(0.5)
        state.view(-1)[3:9].copy_(given.flatten()[:6])
        return state.sum() + top.sum() + where.sum(), hidden

    _, replay = capture(step, torch.device("cpu"))
    for seed in range(3):
        given.copy_(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)))
        before = state.clone()
        want, moved = step(), state.clone()
        state.copy_(before)
        for one, other in zip(replay(), want, strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(state, moved)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([True, False, True])],
        lambda x: x.masked_select(x > 0),
        lambda x: x if x.any() else -x,
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x.nonzero(),
    ],
    ids=["item", "mask", "made mask", "select", "branch", "made", "nonzero"],
)
def test_what_a_graph_could_not_hold_is_refused(step):
    x = torch.tensor([0.5, -1.0, 2.0])
    with pytest.raises(RuntimeError, match="cannot be replayed"):
        capture(lambda: (step(x),), torch.device("cpu"))
