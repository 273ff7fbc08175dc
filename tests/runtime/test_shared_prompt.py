"""A prompt that is run once for several policies: each goes on as if it had run for that one alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import avlprof
from avlprof.attention.session import cache_argument
from avlprof.errors import UserError
from avlprof.evaluation import AnswerSettings, AnswerStore, answers_under, generate_answers
from avlprof.evaluation import generating as module
from avlprof.models.load import load_model
from avlprof.policy import DENSE, PicturePolicy, Policy, PrefillFilter, ScorerSpec
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.runtime.shared_prompt import prompt_of, share_prompt, shares_prompts, without_pictures
from avlprof.tasks import load_task
from avlprof.testing.families import families
from avlprof.testing.models import cases
from tests.helpers import FEW, FEW_MODELS, generate_words, thinned
from tests.hybrids import stateful, windowed
from tests.policies import ADAPTIVE, FORCED, LED, PLAIN, POLICIES, SCORING, TESTED

MODELS = dict((*cases(), *families()))
RANDOM = Policy(vision_keep=0.4, scorer=ScorerSpec(name="random", options={"seed": 3}))
SEVERAL = [*PLAIN.values(), *SCORING.values(), POLICIES["packed core"], RANDOM, DENSE]
STEPS = 7


@cache
def built(name):
    return MODELS[name]()


def prompt_tokens(model):
    """Notes how many tokens the decoder's first layer is handed at a time."""
    seen = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen, hook


def shared(case, inputs, policies):
    """Tokens and logits of every policy from a prompt that runs once, and each one's cache."""
    filled = share_prompt(case.model, inputs, policies)
    seen, hook = prompt_tokens(case.model)
    found = []
    for policy, prompt in zip(policies, filled, strict=True):
        with avlprof.apply(case.model, policy) as runtime, prompt_of(case.model, prompt):
            said = generate_words(
                case, without_pictures(inputs), STEPS, **{cache_argument(case.model): runtime.new_cache()}
            )
        found.append((said, runtime.cache))
    hook.remove()
    assert set(seen) == {1}, "a prompt ran again"
    return found


def same(ours, alone):
    """Bit for bit the same tokens, logits, and layers."""
    (said, held), (words, cache_alone) = ours, alone
    assert torch.equal(said.sequences, words.sequences)
    for a, b in zip(said.logits, words.logits, strict=True):
        assert torch.equal(a, b)
    assert held.use() == cache_alone.use()
    assert held.rows == cache_alone.rows
    for a, b in zip(held.layers, cache_alone.layers, strict=True):
        assert type(a) is type(b)
        for x, y in zip(written(a), written(b), strict=True):
            assert torch.equal(x, y)
        if isinstance(a, AdaptiveLayer):
            assert torch.equal(a.positions, b.positions)
            assert type(a.scorer) is type(b.scorer)  # and holds no scores


def written(layer):
    """Keys and values of a layer without the room for more."""
    if isinstance(layer, AdaptiveLayer):
        there = (layer.positions >= 0)[..., None]
        return [part.masked_fill(~there, 0.0) for part in (layer.keys, layer.values)]
    return [part[:, :, : layer.get_seq_length()] for part in (layer.keys, layer.values)]


def check(case, policies, **inputs):
    prompts = case.inputs(3, seed=8, pad=True, text=9, **inputs)
    for policy, ours in zip(policies, shared(case, prompts, policies), strict=True):
        with avlprof.apply(case.model, policy) as runtime:
            alone = generate_words(case, prompts, STEPS), runtime.cache
        same(ours, alone)


@pytest.mark.parametrize("name", thinned(MODELS, (*FEW, *FEW_MODELS), ("qwen3_vl", "gemma3")))
def test_each_policy_goes_on_as_if_alone(name):
    """Every family, bit for bit, with padding: windows of their own and positions in three dimensions too."""
    case = built(name)
    assert all(shares_prompts(case.model, policy) for policy in SEVERAL)
    check(case, SEVERAL)


@pytest.mark.parametrize(
    "kind", thinned(FORCED | LED | ADAPTIVE, (*TESTED, *LED, "adaptive, 4 bits"), ("packed",))
)
def test_every_kind_of_policy_goes_on_as_if_alone(kind):
    case, policy = built(FEW_MODELS[0]), (FORCED | LED | ADAPTIVE)[kind]
    if policy.prefill_filter:
        assert not shares_prompts(case.model, policy)
        with pytest.raises(UserError, match="cannot share a prompt: it sets prefill_filter"):
            share_prompt(case.model, case.inputs(1), [DENSE, policy])
    else:
        check(case, [DENSE, policy, POLICIES["per head"]], images_per_row=2)


def test_one_run_scores_once_for_all_who_ask_alike(monkeypatch):
    case, asked = built(FEW_MODELS[1]), []
    kind = type(avlprof.scorers.make_scorer(ScorerSpec(name="accumulated")))
    plain = kind.score
    monkeypatch.setattr(kind, "score", lambda self, prefill: asked.append(prefill) or plain(self, prefill))
    same_ranking = [POLICIES["accumulated"], POLICIES["accumulated"].model_copy(update={"vision_keep": 0.5})]
    share_prompt(case.model, case.inputs(2, seed=1), [*same_ranking, POLICIES["position"], POLICIES["h2o"]])
    assert len(asked) == 2 * 3  # a joint pool ranks text too


def test_a_model_is_left_as_it_was():
    case = built(FEW_MODELS[0])
    inputs, policy = case.inputs(2, seed=1), POLICIES["evict"]
    (filled,) = share_prompt(case.model, inputs, [policy])
    with avlprof.apply(case.model, policy):
        with pytest.raises(KeyboardInterrupt), prompt_of(case.model, filled):
            raise KeyboardInterrupt
        assert "forward" not in vars(case.model)
    stock = generate_words(case, inputs, STEPS)
    torch.testing.assert_close(stock.logits[0], case.model(**inputs).logits[:, -1])
    with pytest.raises(UserError, match="heads: adaptive"):
        share_prompt(case.model, inputs, [policy, Policy(heads="adaptive", vision_compute=0.5)])
    assert not case.model._forward_hooks and not case.model._forward_pre_hooks


# --- answers


@pytest.fixture(scope="module")
def samples():
    return load_task("shapes").samples("held-out", 5)


def half(keep, **fields):
    return Policy(
        name="smaller", vision_keep=keep, pictures=PicturePolicy(kind="pooled", share=0.5), **fields
    )


KEPT = [Policy(name=str(keep), vision_keep=keep) for keep in (0.2, 0.3, 0.45)]
ASKED = [
    None,
    *KEPT,
    KEPT[0],
    DENSE,
    half(1.0),
    half(0.5),
    half(0.2, vision_bits=4),
    Policy(prefill_filter=(PrefillFilter(after_layer=2, keep=0.4),)),
]


@pytest.fixture(scope="module")
def alone(tiny, samples):
    return [generate_answers(tiny, samples, policy, AnswerSettings(12, 2, "exact_match")) for policy in ASKED]


@pytest.mark.parametrize("waiting", [1 << 30, 0])
def test_answers_are_those_of_each_policy_alone(tiny, samples, alone, monkeypatch, waiting):
    shared_by = []
    plain = module.share_prompt
    monkeypatch.setattr(module, "SHARED_BYTES", waiting)
    monkeypatch.setattr(module, "share_prompt", lambda *a: shared_by.append(len(a[2])) or plain(*a))
    assert answers_under(tiny, samples, ASKED, AnswerSettings(12, 2, "exact_match")) == alone
    # without room as many wait as one dense cache takes; with whole smaller pictures the model is left alone
    assert shared_by == ([4, 2] * 3 if waiting else [2, 2] * 3)


@pytest.mark.parametrize("make", [windowed, stateful])
def test_layers_with_a_window_or_a_state(tiny, samples, make):
    loaded, settings = make(tiny), AnswerSettings(6, 3, "exact_match")
    assert shares_prompts(loaded.model, KEPT[0]) == (make is windowed)
    found = answers_under(loaded, samples, KEPT, settings)
    assert found == [generate_answers(loaded, samples, policy, settings) for policy in KEPT]


def test_what_is_known_is_not_answered_again(tiny, samples, alone, tmp_path):
    settings = AnswerSettings(12, 2, "exact_match")
    generate_answers(tiny, samples[:2], KEPT[1], settings, store=AnswerStore(tmp_path))
    counts = []

    class Watching(avlprof.watch.Watch):
        def phase(self, name, done, total):
            counts.append((name, done, total))

    found = answers_under(tiny, samples, ASKED, settings, store=AnswerStore(tmp_path), watch=Watching())
    assert [[a.prediction for a in one] for one in found] == [[a.prediction for a in one] for one in alone]
    total = len(ASKED) * len(samples)
    assert counts[0] == ("answers", 2, total) and counts[-1] == ("answers", total, total)
    assert [done for _, done, _ in counts] == sorted(done for _, done, _ in counts)
    assert len({policy and policy.hash for policy in ASKED}) == len(ASKED) - 1


def test_a_prompt_that_is_not_finite_is_named(samples):
    loaded = load_model("tiny", device="cpu")
    with torch.no_grad():
        loaded.model.get_decoder().layers[3].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=f"'{samples[0].id}', from layer 3 on, are not finite"):
        answers_under(loaded, samples[:1], KEPT, AnswerSettings(3, 1))
