"""Proof of a tuned policy: the tests against plain ones, rivals at equal bytes, what is written down."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.evaluation import Evaluation
from avlprof.evaluation.doubts import Guess, best_guess
from avlprof.policy import Policy, PromptShape, ScorerSpec, live_share, read_share, sizes
from avlprof.policy.provenance import Proof
from avlprof.tasks import Sample, load_metric, load_task
from avlprof.testing.allocators import random_evidence
from avlprof.tuning import Budget, Candidate, Space
from avlprof.tuning.candidate import spread
from avlprof.tuning.proof import dense_sentence, power_sentence, samples_needed, verdict
from avlprof.tuning.rivals import rivals, shipped_rivals, static_core
from avlprof.tuning.shortlist import Shortlist, ShortlistEntry, coverage_of, rank_correlation
from tests.helpers import few


def evaluation(scores):
    """A comparison with these scores, `{policy: [sample]}` or `{policy: [seed][sample]}`."""
    rows = []
    for policy, values in scores.items():
        seeds = values if isinstance(values[0], list) else [values]
        rows += [
            {"policy": policy, "family": policy, "seed": seed, "sample": f"s{i}", "score": score}
            for seed, own in enumerate(seeds)
            for i, score in enumerate(own)
        ]
    return Evaluation({}, pd.DataFrame(rows))


# --- the verdict ---


@pytest.mark.parametrize("seed", range(6))
def test_a_verdict_is_the_paired_test_of_each_rival(seed):
    """p by full enumeration of signs, means by hand, rivals with several seeds averaged per sample."""
    rng = np.random.default_rng(seed)
    ours, plain = rng.integers(0, 3, (2, 9)) / 2
    random = rng.integers(0, 3, (3, 9)) / 2
    found = verdict(
        evaluation({"dense": [1.0] * 9, "tuned": [*ours], "uniform": [*plain], "random x3": random.tolist()}),
        "tuned",
        "random",
        0.05,
    )
    assert found.strongest == "random x3"
    assert list(found.differences) == ["dense", "uniform", "random x3"]
    for name, theirs in (("uniform", plain), ("random x3", random.mean(axis=0))):
        gaps = ours - theirs
        signs = [abs(np.dot(sign, gaps)) for sign in product((-1, 1), repeat=9)]
        wanted = np.mean([total >= abs(gaps.sum()) - 1e-9 for total in signs])
        assert found.differences[name].difference.mean == pytest.approx(gaps.mean())
        assert found.differences[name].p_value == pytest.approx(wanted)
    assert not found.non_inferior
    assert any("9 samples are too few" in doubt for doubt in found.doubts)


def test_not_inferior_needs_the_interval_above_the_margin():
    rng = np.random.default_rng(0)
    theirs = rng.integers(0, 2, 400).astype(float)
    lost = theirs.copy()
    lost[np.flatnonzero(theirs)[:8]] = 0.0  # 2% of the samples
    same, worse = (evaluation({"tuned": [*ours], "rival": [*theirs]}) for ours in (theirs, lost))
    none = verdict(same, "tuned", "rival", 0.001)
    assert not none.non_inferior, "an interval without width shows nothing"
    assert none.doubts == ("no sample tells the two apart, so the interval has no width",)
    assert not verdict(worse, "tuned", "rival", 0.02).non_inferior
    assert not verdict(worse, "tuned", "rival", 0.03).non_inferior
    assert verdict(worse, "tuned", "rival", 0.05).non_inferior
    assert verdict(worse, "tuned", "rival", 0.005).answer.startswith("not shown: 400 samples, where a tie")
    assert "by more than 0.05: yes (-0.020" in verdict(worse, "tuned", "rival", 0.05).sentences()[-1]
    said = verdict(worse, "tuned", "rival", 0.02).sentences()[-1]
    assert "by more than 0.02: not shown: the interval reaches below -0.02 (-0.020" in said
    lost[np.flatnonzero(theirs)[:80]] = 0.0
    worst = verdict(evaluation({"tuned": [*lost], "rival": [*theirs]}), "tuned", "rival", 0.1)
    assert worst.answer == "no"


def answers(scores, **columns):
    """`evaluation` with the columns that its answers have, one value or a function of the policy."""
    found = evaluation(scores)
    for name, value in columns.items():
        found.answers[name] = found.answers["policy"].map(value)
    return found


@pytest.mark.parametrize(
    ("scores", "guess", "why"),
    [
        (
            {"dense": [0.0] * 8, "tuned": [0.0] * 8, "rival": [0.0] * 8},
            None,
            ["dense scores 0 on every sample", "8 samples are too few", "no sample tells the two apart"],
        ),
        (
            {"dense": [1.0] * 4, "tuned": [1.0] * 4, "rival": [1.0] * 4},
            None,
            ["4 samples are too few", "no sample tells the two apart"],
        ),
        ({"dense": [1.0], "tuned": [1.0], "rival": [0.0]}, None, ["1 sample is too few"]),
        (
            {"dense": [0.0] * 100, "tuned": [1.0, 0.0] * 50, "rival": [0.0] * 100},
            None,
            ["dense scores 0 on every sample"],
        ),
        (
            {"dense": [1.0, 0.0] * 50, "tuned": [1.0, 0.0] * 50, "rival": [0.0, 0.0] * 49 + [1.0, 0.0]},
            Guess("yes", 0.52),
            ["dense scores 0.500, no more than 'yes' as the answer to everything (0.520)"],
        ),
        (
            {"dense": [1.0] * 30, "tuned": [0.5] * 30, "rival": [0.0] * 30},
            None,
            ["all differences are equal, so the interval has no width"],
        ),
        (
            {"dense": [1.0] * 100, "tuned": [0.0] * 99 + [1.0], "rival": [1.0] + [0.0] * 99},
            None,
            ["a margin of 0.05 is all that rival scores (0.010)"],
        ),
        (
            {"dense": [1.0] * 40, "tuned": [1.0, 0.0] * 20, "rival": [1.0, 0.0, 0.0, 1.0] * 10},
            None,
            ["40 samples, where a tie within 0.05 takes about 1,"],
        ),
    ],
)
def test_what_shows_nothing_is_not_shown(scores, guess, why):
    """Too few, all alike, nothing to lose, no better than a guess, or a margin that allows all."""
    found = verdict(evaluation(scores), "tuned", "rival", 0.05, guess)
    assert not found.non_inferior
    assert found.answer.startswith("not shown: ")
    for text in why:
        assert any(text in doubt for doubt in found.doubts), (text, found.doubts)
    assert "not shown: " in found.sentences()[-1]
    few = len(scores["dense"]) < 10
    assert all(("too small for an interval" in line) == few for line in found.sentences())


def test_a_plain_win_needs_no_more_samples_than_it_has():
    """The estimate is what a tie takes; an interval above zero asks for none."""
    rng = np.random.default_rng(3)
    theirs = rng.integers(0, 2, 60).astype(float)
    ours = np.where(rng.random(60) < 0.6, 1.0, theirs)
    proof = evaluation({"dense": [1.0] * 60, "tuned": [*ours], "rival": [*theirs]})
    found = verdict(proof, "tuned", "rival", 0.02)
    assert samples_needed(0.02, found.against_strongest.sd) > 60
    assert found.non_inferior and found.answer == "yes"


def test_a_rival_that_is_the_winner_is_named():
    scores = {"tuned": [1.0, 0.0] * 20, "rival": [1.0, 0.0] * 20}

    def doubts(**columns):
        return verdict(answers(scores, **columns), "tuned", "rival", 0.05).doubts

    assert "rival is the same policy as tuned" in doubts(policy_hash=lambda n: "a", prediction=lambda n: "x")
    alike = doubts(policy_hash=lambda n: n, prediction=lambda n: "x")
    assert "rival gives the same answers as tuned, word for word" in alike
    other = doubts(policy_hash=lambda n: n, prediction=lambda n: n)
    assert not any("same" in doubt for doubt in other)
    with pytest.raises(UserError, match="gone, the strongest rival, has no row in the proof: it is the same"):
        verdict(evaluation(scores), "tuned", "gone", 0.05)


def test_a_metric_that_gives_no_number_is_named():
    proof = evaluation({"tuned": [1.0, math.nan, 0.0], "rival": [1.0, 1.0, 0.0]})
    with pytest.raises(UserError, match=r"gave nan for sample 's1' \(1 of 6 samples\)"):
        verdict(proof, "tuned", "rival", 0.05)


def test_the_best_guess_is_the_best_constant_answer():
    def sample(name, *references):
        return Sample(id=name, images=(), prompt="?", answers=references)

    samples = [sample(str(n), text) for n, text in enumerate(["yes", "no", "yes", "4"])]
    assert best_guess("exact_match", samples) == Guess("yes", 0.5)
    samples = [sample("0", "red circle"), sample("1", "red square"), sample("2", "blue star")]
    known = best_guess("token_f1", samples)
    judge = load_metric("token_f1")
    every = [text for one in samples for text in one.answers]
    assert known.score == max(np.mean([judge(text, one.answers) for one in samples]) for text in every)


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        ([1.0, 0.0] * 5, []),
        ([1.0, 0.0], ["2 samples are too few for an interval (10 or more are needed)"]),
        ([0.0] * 12, ["dense scores 0 on every sample, so no policy can lose anything"]),
        ([0.0], ["1 sample is too few", "dense scores 0"]),
    ],
)
def test_a_table_says_what_its_samples_cannot_show(dense, said):
    found = evaluation({"dense": dense, "mine": dense})
    for name in ("kl", "agreement", "generated_tokens", "live_bytes", "dense_bytes", "allocated_bytes"):
        found.answers[name] = 1.0
    found.answers["read_bytes_per_step"] = 1.0
    assert len(found.warnings()) == len(said)
    assert all(text in line for text, line in zip(said, found.warnings(), strict=True))


def test_dense_that_shows_nothing_is_said_aloud_before_the_search():
    task = load_task("shapes:count")
    samples = task.samples("search", 12)
    said = dense_sentence(np.zeros(12), task, "search", samples)
    assert said.startswith("WARNING: dense scores 0 on every sample")
    assert "no policy can be judged by exact_match" in said
    said = dense_sentence(np.ones(12), task, "search", samples)
    assert said.startswith("WARNING: dense scores 1.000 on every one of the 12 samples of split 'search'")
    assert dense_sentence(np.array([1.0] * 11 + [0.0]), task, "search", samples) == ""


@pytest.mark.parametrize(
    ("proof", "holds"),
    [
        ({"non_inferior": True}, True),
        ({"non_inferior": False}, False),
        ({"non_inferior": True, "doubts": ("too few",)}, False),
        ({"non_inferior": True, "differences": {"r": {"mean": 0, "low": 0, "high": 0, "p_value": 1}}}, False),
        ({"non_inferior": True, "differences": {"r": {"mean": 0, "low": -1, "high": 1, "p_value": 1}}}, True),
    ],
)
def test_a_noted_proof_holds_only_with_evidence(proof, holds):
    """Files of 0.1.0 said yes to intervals without width."""
    noted = Proof(split="held-out", samples=100, strongest="r", margin=0.02, **proof)
    assert noted.holds is holds


@pytest.mark.parametrize(("sd", "margin"), [(0.3, 0.05), (0.5, 0.1), (1.0, 0.15)])
def test_enough_samples_show_a_tie_four_times_in_five(sd, margin):
    """By simulation of normal differences with mean zero."""
    n = samples_needed(margin, sd)
    gaps = np.random.default_rng(1).normal(0.0, sd, (2000, n))
    low = gaps.mean(axis=1) - 1.96 * gaps.std(axis=1, ddof=1) / math.sqrt(n)
    assert (low > -margin).mean() == pytest.approx(0.8, abs=0.04)


def test_power_is_told_before_the_proof():
    ours, theirs = np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0])
    sd = float(np.std([0.0, -1.0, 1.0, 0.0], ddof=1))
    drop = (1.959964 + 0.841621) * sd / math.sqrt(200)
    said = power_sentence(200, 0.02, ours, theirs, "uniform - dense")
    assert said.startswith(f"200 held-out samples can show a drop of {drop:.3f} (80% power, 5% two-sided; ")
    assert f"sd {sd:.2f} of uniform - dense on 4 search samples" in said
    assert f"takes about {samples_needed(0.02, sd):,}" in said
    blind = power_sentence(200, 0.02, ours, ours, "uniform - dense")
    assert "no search sample tells uniform - dense apart, so this is the worst case" in blind
    assert "to show" not in power_sentence(100_000, 0.02, ours, theirs, "uniform - dense")


# --- rivals ---


PROMPTS = (PromptShape(3, 60, 9), PromptShape(3, 60, 7), PromptShape(2, 41, 5))


def winner_at(budget, seed):
    evidence = random_evidence(5, 60, np.random.default_rng(seed))
    kind = ("coverage", "pyramid", "uniform")[seed % 3]
    start = Candidate(kind, scorer="instruction", heads="kv_head", refresh_interval=4)
    return start.policy(evidence, budget), evidence


@pytest.mark.parametrize("read", few([None, 0.25], [0.25]))
@pytest.mark.parametrize("seed", few(range(4), 1))
def test_shipped_rivals_use_no_more_than_the_winner(seed, read):
    budget = Budget(0.4, read, PROMPTS, 10)
    winner, evidence = winner_at(budget, seed)
    named = rivals(winner, budget, 5)
    more, left_out = shipped_rivals(winner, budget, evidence, named)
    token = len(PROMPTS) / sum(prompt.total for prompt in PROMPTS)
    assert {policy.name for policy in more}
    assert not {policy.name for policy in more} & ({"uniform", "random"} | set(left_out))
    assert len({policy.hash for policy in (winner, *named, *more)}) == 1 + len(named) + len(more)
    live, reads = live_share(winner, PROMPTS, 5), read_share(winner, PROMPTS, 5, 10)
    for policy in more:
        assert live_share(policy, PROMPTS, 5) <= live + 1e-12
        if read is not None:
            assert read_share(policy, PROMPTS, 5, 10) <= reads + token + 1e-9
        elif policy.joint is None and not policy.prefill_filter and set(policy.keep(5)) != {1.0}:
            assert live_share(policy, PROMPTS, 5) > live - token - 1e-9
    assert all(isinstance(reason, str) and reason for reason in left_out.values())


@pytest.mark.parametrize(("memory", "read"), [(0.22, None), (0.28, 0.24)])
def test_rivals_of_few_bits_have_the_same_bytes_with_them_and_without(memory, read):
    budget = Budget(memory, read, PROMPTS, 10)
    evidence = random_evidence(5, 60, np.random.default_rng(3))
    start = Candidate("pyramid", scorer="instruction", refresh_interval=4, vision_bits=3, text_bits=4)
    winner = start.policy(evidence, budget)
    assert (winner.vision_compute is None) == (read is None)
    named = {policy.name: policy for policy in rivals(winner, budget, 5)}
    bits = {name: policy.vision_bits for name, policy in named.items()}
    assert bits == dict.fromkeys(named, 16) | {"uniform, same scorer": 3} | (
        {} if read is None else {"static core": 3}
    )
    texts = {name: policy.text.bits for name, policy in named.items()}
    assert texts == {name: 4 if few < 16 else 16 for name, few in bits.items()}
    assert {"uniform", "uniform, same scorer, 16 bits", "uniform, last_query", "random"} <= set(named)
    live, reads = live_share(winner, PROMPTS, 5), read_share(winner, PROMPTS, 5, 10)
    token = len(PROMPTS) / sum(prompt.total for prompt in PROMPTS)
    for policy in named.values():
        assert live - token - 0.001 < live_share(policy, PROMPTS, 5) <= live + 1e-12
        assert read_share(policy, PROMPTS, 5, 10) <= reads + 1e-9
        if policy.name.startswith("uniform, same"):
            assert (policy.scorer, policy.heads) == (winner.scorer, winner.heads)
    more, _ = shipped_rivals(winner, budget, evidence, list(named.values()))
    quantised = {policy.name: policy for policy in more if policy.packs}
    assert set(quantised) == {"quantised-8", "quantised-4", "quantised-2"}
    if read is None:
        budget = replace(budget, memory=0.5)
        wide, _ = shipped_rivals(winner_at(budget, 0)[0], budget, evidence)
        kept = next(policy.vision_keep for policy in wide if policy.name == "quantised-2")
        assert kept == 1.0, "what fits is kept whole"


@pytest.mark.parametrize("read", [None, 0.24])
def test_rivals_of_smaller_pictures_have_them_and_have_not(read):
    prompts = tuple(replace(prompt, grids=((1, prompt.vision),)) for prompt in PROMPTS)
    budget, evidence = Budget(0.28, read, prompts, 10), random_evidence(5, 60, np.random.default_rng(3))
    start = Candidate("pyramid", scorer="instruction", vision_bits=8, pictures="pooled", picture_share=0.5)
    winner = start.policy(evidence, budget)
    named = {policy.name: policy for policy in rivals(winner, budget, 5)}
    same, whole = (named[f"uniform, {end}"] for end in ("same scorer", "whole pictures"))
    assert {name for name, policy in named.items() if policy.pictures} == {"uniform, same scorer"}
    assert same.pictures == winner.pictures
    assert same.scorer == whole.scorer == winner.scorer and same.vision_bits == whole.vision_bits == 8
    assert len({winner.hash, *(policy.hash for policy in named.values())}) == 1 + len(named)
    live, reads = live_share(winner, prompts, 5), read_share(winner, prompts, 5, 10)
    token = len(prompts) / sum(prompt.total for prompt in prompts)
    for policy in named.values():
        assert live - token - 0.001 < live_share(policy, prompts, 5) <= live + 1e-12
        assert read_share(policy, prompts, 5, 10) <= reads + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_the_static_core_is_flat_and_never_picked_anew(seed):
    budget = Budget(0.5, 0.3, PROMPTS, 10)
    winner, _ = winner_at(budget, seed)
    static = static_core(winner, budget, 5)
    token = len(PROMPTS) / sum(prompt.total for prompt in PROMPTS)
    assert static.refresh_interval == 0
    assert (static.scorer, static.heads) == (winner.scorer, winner.heads)
    for prompt in PROMPTS:
        layers = sizes(static, prompt, 5)
        assert max(s.vision for s in layers) - min(s.vision for s in layers) <= 1
        assert max(s.core for s in layers) - min(s.core for s in layers) <= 1
    assert live_share(winner, PROMPTS, 5) - live_share(static, PROMPTS, 5) <= token + 1e-9
    reads = read_share(winner, PROMPTS, 5, 10) - read_share(static, PROMPTS, 5, 10)
    assert 0 <= reads <= token + 1e-9
    assert "static core" in {policy.name for policy in rivals(winner, budget, 5)}
    assert "static core" not in {policy.name for policy in rivals(winner, Budget(0.5, None, PROMPTS, 10), 5)}


def test_refreshes_that_only_score_leave_room_for_a_larger_core():
    full = Policy(vision_keep=(0.5,) * 4, refresh_interval=2)
    score_only = full.model_copy(update={"refresh": "score_only"})
    budget = Budget(live_share(full, PROMPTS, 4), 0.5, PROMPTS, 10)
    cores = [spread(p, (1.0,) * 4, budget).compute(4) for p in (full, score_only)]
    assert sum(cores[1]) > sum(cores[0])
    with pytest.raises(UserError, match=r"read budget 0\.1 is below"):
        spread(full, (1.0,) * 4, replace(budget, read=0.1))


# --- what is learnt on the way ---


def ranks(values):
    return [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


@pytest.mark.parametrize("seed", range(6))
def test_rank_correlation_is_pearsons_of_the_ranks(seed):
    rng = np.random.default_rng(seed)
    scores, metric = rng.integers(0, 5, (2, 8)).astype(float)
    scores[seed % 8] = np.nan
    known = ~np.isnan(scores)
    wanted = np.corrcoef(ranks(scores[known]), ranks(metric[known]))[0, 1]
    assert rank_correlation(scores, metric) == (pytest.approx(wanted), 7)


def test_rank_correlation_of_too_little_is_unknown():
    flat = np.array([1.0, 1.0, 1.0])
    rising = np.array([1.0, 2.0, 3.0])
    for scores, metric in ((flat, rising), (rising, flat), (rising[:2], rising[:2])):
        assert np.isnan(rank_correlation(scores, metric)[0])


def test_coverage_of_a_policy_is_what_its_tokens_could_hold():
    curves = np.array([[0.5, 0.8, 0.9, 1.0], [0.25, 0.5, 0.75, 1.0]])
    evidence = Evidence(2, 4, curves)
    assert coverage_of(Policy(vision_keep=(0.5, 0.25)), evidence) == pytest.approx((0.8 + 0.25) / 2)
    assert coverage_of(Policy(vision_keep=(0.0, 1.0)), evidence) == pytest.approx(0.5)
    joint = Policy(pool="joint", joint={"keep": 0.5}, scorer="position")
    assert np.isnan(coverage_of(joint, evidence))


def test_the_shortlist_is_written_down(tmp_path):
    policy = Policy(vision_keep=(0.5, 0.5))
    trial = SimpleNamespace(number=7)
    entries = tuple(
        ShortlistEntry(
            name, policy, np.full(20, metric), np.full(20, kl), coverage, trial if name == "trial 7" else None
        )
        for name, metric, kl, coverage in (
            *(("trial 7", 0.9, 0.1, 0.8), ("uniform", 0.7, 0.2, 0.8)),
            *(("random", 0.5, 0.5, 0.8), ("h2o", 0.6, 0.3, math.nan)),
        )
    )
    shortlist = Shortlist(entries, entries[0], entries[1], np.ones(20), {"fastv": "too far"})
    shortlist.write(tmp_path / "fidelity.json", "exact_match", "search")
    found = json.loads((tmp_path / "fidelity.json").read_text())
    assert found["rank_correlation"] == {
        "coverage": {"spearman": None, "policies": 3},
        "forced, 16 samples": {"spearman": 1.0, "policies": 4},
        "forced, 20 samples": {"spearman": 1.0, "policies": 4},
    }
    assert [row["trial"] for row in found["policies"]] == [7, None, None, None]
    assert found["policies"][3] == {
        **{"policy": "h2o", "trial": None, "exact_match": 0.6, "forced": 0.3, "coverage": None}
    }
    assert (found["samples"], found["left_out"]) == (20, {"fastv": "too far"})


def test_no_evidence_leaves_a_rival_out_with_the_reason():
    budget = Budget(0.4, None, PROMPTS, 10)
    winner = Policy(vision_keep=(0.3, 0.5, 0.2), scorer=ScorerSpec(name="instruction"))
    more, left_out = shipped_rivals(winner, budget, Evidence(layers=3, tokens=60))
    assert "prefixkv" not in {policy.name for policy in more}
    assert "needs the coverage curves" in left_out["prefixkv"]


def test_a_sampler_that_is_not_installed_is_refused(monkeypatch):
    import importlib.util

    from avlprof.tuning import Settings

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="sampler 'cmaes' needs the package cmaes; pip install cmaes"):
        Settings(sampler="cmaes")
    assert Space().text == "auto"
