"""Answers scored token by token: as in one pass where a model bears both, and right where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import avlprof
from avlprof.api.tune import tune
from avlprof.policy import DENSE, Policy, live_share
from avlprof.runtime.forced import ForcedBatch, ForcedSet, SteppedBatch
from avlprof.tasks import load_task
from avlprof.testing.families import families
from avlprof.testing.models import cases
from avlprof.testing.types import tiny_inputs, tiny_model, vision_ids
from avlprof.tracing import TraceSettings
from avlprof.tuning import Settings
from tests.helpers import answers_of, few, generate, steps_and_first
from tests.hybrids import stateful
from tests.policies import FORCED
from tests.watching import Notes

TASK = "shapes:count"
LENGTHS = (19, 7, 1, 13, 7)


@pytest.mark.parametrize("name", few(["core, k=3", "h2o", "filter", "dense"], 2))
def test_a_model_that_bears_both_is_scored_the_same(name):
    case = dict(cases())["qwen2_5_vl-6q2kv"]()
    inputs = case.inputs(batch=5, seed=21, pad=True, text=11, images_per_row=[1, 2, 1, 0, 1])
    answers = answers_of(LENGTHS)
    policy, ids = FORCED[name], list("abcde")
    stepped, forced = (kind(case.model, inputs, answers) for kind in (SteppedBatch, ForcedBatch))
    torch.testing.assert_close(stepped.logits(policy), forced.logits(policy), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(stepped.score(policy, ids), forced.score(policy, ids), strict=True):
        assert (ours.sample, ours.tokens, ours.agreement) == (theirs.sample, theirs.tokens, theirs.agreement)
        assert ours.kl == pytest.approx(theirs.kl, abs=1e-4)
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)
    assert stepped.shapes == forced.shapes


@pytest.mark.parametrize("name", few(dict(families()), ["paligemma"]))
def test_families_are_scored_the_same_in_few_bits(name):
    """Codes follow the rotated keys, so that prompts have to stand at the positions of `generate`."""
    case = dict(families())[name]()
    inputs, answers = case.inputs(batch=2, seed=33, pad=True, text=11), answers_of((9, 4))
    policy = Policy(vision_keep=0.6, vision_bits=4)
    stepped, forced = (kind(case.model, inputs, answers) for kind in (SteppedBatch, ForcedBatch))
    torch.testing.assert_close(stepped.logits(policy), forced.logits(policy), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def hybrid(tiny):
    """Layers with a state beside layers with keys and values."""
    return stateful(tiny)


def test_a_state_sees_token_after_token(hybrid):
    samples = load_task(TASK).samples("search", 3)
    inputs = hybrid.adapter.encode_samples(samples)
    answers = answers_of(LENGTHS[:3])
    policy = Policy(vision_keep=0.3, vision_compute=0.1, refresh_interval=2)
    found = SteppedBatch(hybrid.model, inputs, answers).score(policy, list("abc"))
    dense, ours = (steps_and_first(hybrid.model, inputs, answers, p).double() for p in (DENSE, policy))
    for row, (answer, score) in enumerate(zip(answers, found, strict=True)):
        p, q = dense[row, : len(answer)].softmax(-1), ours[row, : len(answer)].softmax(-1)
        assert score.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-4)
        assert score.tokens == len(answer)
    assert found[0].kl > 1e-6


def test_a_set_says_that_it_goes_token_by_token(hybrid):
    samples = load_task(TASK).samples("search", 3)
    watch = Notes()
    forced = ForcedSet.prepare(hybrid, samples, max_new_tokens=4, batch_size=2, watch=watch)
    assert any("token by token" in text and "a state of fixed size" in text for text in watch.sentences)
    assert [score.kl for score in forced.score(DENSE)] == pytest.approx([0, 0, 0], abs=1e-6)
    one, other = Policy(vision_keep=0.4), Policy(vision_keep=0.1)
    together = forced.score_many([one, other])
    assert together[0] == forced.score(one)
    assert together[1] == forced.score(other)


@pytest.mark.full  # a study
def test_a_model_with_states_is_tuned(hybrid, tmp_path):
    settings = TraceSettings(max_new_tokens=4)
    run = avlprof.trace(hybrid, TASK, 3, settings, out=tmp_path / "run")
    few_trials = replace(Settings(), trials=4, refine=0, samples=4, proof_samples=4, max_new_tokens=4)
    tuned = tune(hybrid, TASK, 0.5, few_trials, run=run, out=tmp_path / "study")
    prompts = list(run.profile().prompts())
    assert live_share(tuned.policy, prompts, 5) <= 0.5
    assert tuned.policy.provenance.governed == (1, 4)
    assert {"dense", "tuned"} <= set(tuned.proof.answers["policy"])


@pytest.mark.parametrize("name", few(["qwen3_5", "lfm2_vl", "gemma4:shared", "gemma4"], 1))
def test_other_layers_do_not_feel_the_bits_of_those_that_a_policy_acts_on(name):
    """Eight bits of all vision tokens are near the stock model; a prompt's first logits are its own."""
    model = tiny_model(name)
    inputs, words = tiny_inputs(model, batch=2), list(vision_ids(model))
    stock = generate(model, inputs, 5, suppress_tokens=words)
    with avlprof.apply(model, Policy(vision_keep=1.0, vision_bits=8)) as runtime:
        ours = generate(model, inputs, 5, suppress_tokens=words)
    assert all(use.prompt < use.dense_prompt for use in runtime.cache.use())
    torch.testing.assert_close(ours.logits[0], stock.logits[0])
    off = (ours.logits[1] - stock.logits[1]).abs().max()
    assert 0 < off < 0.01 * stock.logits[1].std()


@pytest.mark.full  # a trace, and answers of twenty samples forced under three policies
def test_what_is_derived_by_default_beats_random_tokens_and_the_last_row(tiny, tmp_path):
    """The first thing that a newcomer does: trace, derive at a budget, and look whether it is any good."""
    run = avlprof.trace(tiny, "shapes", 6, TraceSettings(max_new_tokens=4), out=tmp_path / "run")
    profile = run.profile()
    policies = [profile.derive(budget=0.3)]
    policies += [profile.derive(budget=0.3, scorer=name) for name in ("random", "last_query")]
    samples = load_task("shapes").samples("held-out", 20)
    scorers = [policy.scorer for policy in policies]
    forced = ForcedSet.prepare(tiny, samples, max_new_tokens=12, scorers=scorers)
    ours, chance, row = (sum(score.kl for score in forced.score(policy)) for policy in policies)
    assert ours < chance
    assert ours < row
