"""The search space: candidates against budgets, starts, settings, and what the sensitivity probe allots."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from optuna.trial import FixedTrial

from avlprof.allocators import Evidence
from avlprof.allocators.sensitivity import Sensitivity
from avlprof.analysis.derive import leading_layers
from avlprof.errors import UserError
from avlprof.policy import (
    Policy,
    PromptShape,
    TextPolicy,
    live_share,
    read_share,
)
from avlprof.testing.allocators import random_evidence
from avlprof.tuning import Budget, Candidate, Settings, Space
from avlprof.tuning.refine import Moved
from avlprof.tuning.settings import check_budget
from avlprof.tuning.space import HEADS, PICTURES
from tests.helpers import few
from tests.search_space import ALLOCATORS, SPACE, probed_evidence


@pytest.mark.parametrize("seed", few(range(40), 8))
def test_every_candidate_meets_its_budgets(seed):
    rng = np.random.default_rng(seed)
    layers, count = int(rng.integers(1, 9)), int(rng.integers(4, 60))
    evidence = probed_evidence(layers, count, seed)
    # one shape, or several: then each prompt rounds down by itself
    sizes = [count] if seed % 2 else [count, *rng.integers(1, count + 1, size=2).tolist()]
    prompts = tuple(
        PromptShape(int(rng.integers(0, 4)), n, int(rng.integers(1, 6)), grids=((1, n),)) for n in sizes
    )
    window = seed % 3 == 0
    text = TextPolicy(window=1) if window else TextPolicy()
    always = live_share(Policy(vision_keep=0.0, text=text), prompts, layers)
    memory = float(rng.uniform(always, 1.0))
    read = float(rng.uniform(always, 1.0)) if seed % 4 > 1 else None
    budget = Budget(memory, read, prompts, int(rng.integers(1, 12)))
    space = Space(heads=HEADS, text="trade" if window else "all", pictures=PICTURES)
    space = space.within(budget, layers).supported(evidence)
    assert space.leaders == tuple(n for n in (0, 1, 2, 3) if n < layers)
    assert space.heads == (HEADS if read is None else ("shared", "kv_head"))
    dense = layers * sum(prompt.total for prompt in prompts)
    slack = layers * len(prompts) / dense
    for _ in range(6):
        candidate = Candidate(
            allocator=str(rng.choice(space.allocators)),
            mix=float(rng.uniform()),
            temperature=float(rng.uniform(0.25, 4)),
            floor=float(rng.uniform(0, min(0.1, memory))),
            midpoint=float(rng.uniform(0.05, 0.95)),
            scorer=str(rng.choice(space.scorers)),
            heads=str(rng.choice(space.heads)),
            refresh_interval=int(rng.choice(space.refreshes)),
            refresh=str(rng.choice(space.refresh)),
            compute_temperature=float(rng.uniform(0.25, 4)),
            text_share=float(rng.uniform(0.02, 1)) if window else None,
            text_sink=int(rng.integers(0, 5)) if window else 0,
            vision_bits=None if seed % 3 == 0 else int(rng.choice(space.bits)),
            core_prompt=None if seed % 5 == 0 else float(rng.choice(space.core_prompts)),
            core_memory=None if seed % 5 == 0 else float(rng.choice(space.core_memories)),
            text_bits=None if seed % 7 == 0 else int(rng.choice(space.text_bits)),
            leading=int(rng.choice(space.leaders)),
            leading_interval=int(rng.choice((1, 2, 4))),
            pictures=None if seed % 2 == 0 else str(rng.choice(space.pictures)),
            picture_share=float(rng.choice(space.picture_shares)),
        )
        policy = candidate.policy(evidence, budget)
        check_budgets(policy, budget, layers, slack)
        assert policy.scorer.name == candidate.scorer.partition(":")[0]
        assert policy.heads == candidate.heads
        assert policy.vision_bits == (candidate.vision_bits or 16)
        if candidate.pictures in (None, "whole"):
            assert policy.pictures is None
        else:
            assert (policy.pictures.kind, policy.pictures.share) == (
                candidate.pictures,
                candidate.picture_share,
            )
            left = [max(int(candidate.picture_share * n + 1e-6), 1) for n in sizes]
            assert [prompt.shrunk(policy.pictures).vision for prompt in prompts] == left
        if not window or candidate.packs_text:
            assert policy.text == TextPolicy(bits=candidate.text_bits or 16)
        elif policy.text.window is not None:
            asked = max(round(candidate.text_share * budget.text_room), 1)
            assert policy.text.window <= asked
            assert policy.text.sink <= candidate.text_sink
        if read is not None:
            every = candidate.refresh_interval
            if candidate.leading:  # twice as long until it can be paid
                every = candidate.leading_interval
                assert policy.refresh_layers == leading_layers(evidence, candidate.leading)
                assert policy.refresh == "score_only"
                longer = {every << times for times in range(5)}
                assert policy.refresh_interval in longer | {0}
            else:
                assert policy.refresh_interval == every and policy.refresh_layers is None
            asked = (candidate.core_prompt or 0.0, candidate.core_memory or 0.0)
            wanted = asked if every else (0.0, 0.0)
            assert (policy.core_score.prompt, policy.core_score.memory) == wanted
            moved = Moved(policy, *(tuple(rng.uniform(-1, 1, layers)) for _ in range(2)))
        else:
            moved = Moved(policy, tuple(rng.uniform(-1, 1, layers)))
        found = moved.policy(evidence, budget)
        check_budgets(found, budget, layers, slack)
        assert (found.text, found.scorer, found.refresh) == (policy.text, policy.scorer, policy.refresh)
        assert found.pictures == policy.pictures


def check_budgets(policy, budget, layers, slack):
    """Never above a budget, and at most one token a layer and prompt below, unless all is kept or read.

    A core beside few bits costs more memory than they do: kept and core shares are then found together,
    to a thousandth of the budget more.
    """
    more = budget.memory / 1000 if policy.packs and policy.vision_compute is not None else 1e-9
    live = live_share(policy, budget.prompts, layers)
    assert live <= budget.memory
    assert live > budget.memory - slack - more or set(policy.keep(layers)) == {1.0}
    if budget.read is None:
        assert policy.compute(layers) == policy.keep(layers)
        return
    used = read_share(policy, budget.prompts, layers, budget.answer_tokens)
    assert used <= budget.read
    assert used > budget.read - slack - more or policy.compute(layers) == policy.keep(layers)


def test_a_budget_below_the_text_cuts_the_text():
    """80 text tokens of 100: at 30% in 16 bits a window must do, and `all` refuses; in 4 all stays."""
    prompts, layers = (PromptShape(2, 18, 80),), 3
    evidence = probed_evidence(layers, 18, 1)
    for read in (None, 0.2):
        budget = Budget(0.3, read, prompts, 8)
        few = Space(text_bits=(16, 4, 3)).within(budget, layers)
        assert (few.text, few.text_bits) == (("all", (4, 3)) if read is None else ("trade", (16,)))
        traded = Space(text="trade").within(budget, layers)
        assert (traded.text, traded.text_bits) == ("trade", (16, 4, 3) if read is None else (16,))
        plain = replace(Space(), text_bits=(16,))
        space = plain.within(budget, layers).supported(evidence)
        assert space.text == "trade"
        for start in space.starts():
            policy = start.policy(evidence, budget)
            assert 0 < policy.text.window <= 30 - 2
            check_budgets(policy, budget, layers, layers / 100)
        with pytest.raises(UserError, match=r"^budget 0\.3 is below 0\.82, what system and text alone need"):
            replace(plain, text="all").within(budget, layers)
    assert Space().within(Budget(0.9, None, prompts, 8), layers).text == "all"
    with pytest.raises(UserError, match="adaptive alone does not go with a read budget"):
        Space(heads=("adaptive",)).within(Budget(0.9, 0.9, prompts, 8), layers)
    assert Space(text="trade").within(Budget(0.9, None, prompts, 8), layers).text == "trade"
    with pytest.raises(UserError, match=r"^budget 0\.01 is below 0\.03"):
        Space().within(Budget(0.01, None, prompts, 8), layers)


def test_a_start_that_keeps_all_text_is_the_policy_without_a_window():
    prompts = (PromptShape(1, 30, 9), PromptShape(1, 30, 5))
    budget, evidence = Budget(0.6, None, prompts, 7), probed_evidence(3, 30, 1)
    all_of_it = Candidate(text_share=1.0).policy(evidence, budget)
    assert all_of_it.hash == Candidate().policy(evidence, budget).hash
    some = Candidate(text_share=0.25).policy(evidence, budget)
    assert some.text.window == 4
    assert sum(some.keep(3)) > sum(all_of_it.keep(3))


def test_allocators_without_evidence_are_left_out():
    bare = Evidence(layers=4, tokens=30)
    assert Space().supported(bare).allocators == ("uniform", "pyramid", "sigmoid")
    with pytest.raises(UserError, match="allocator 'coverage' needs the coverage curves"):
        Space(("coverage", "sensitivity")).supported(bare)


def test_floor_and_mix_do_what_they_say():
    evidence = probed_evidence(6, 100, 0)
    budget = Budget(0.3, None, (PromptShape(2, 100, 6),), 4)
    uniform = Candidate().policy(evidence, budget).keep(6)
    assert max(uniform) - min(uniform) <= 0.01 + 1e-9
    for name in ALLOCATORS:
        assert Candidate(name, mix=0.0, temperature=3.0).policy(evidence, budget).keep(6) == uniform
        assert min(Candidate(name, floor=0.1).policy(evidence, budget).keep(6)) >= 0.1
    steep, flat = (Candidate("pyramid", temperature=t).policy(evidence, budget).keep(6) for t in (4.0, 0.25))
    assert steep[0] > flat[0] > flat[-1] > steep[-1]


def test_infeasible_budgets_name_what_is_enough():
    prompts, layers = (PromptShape(3, 20, 7), PromptShape(1, 10, 9)), 4
    for budget in (Budget(0.1, None, prompts, 8), Budget(0.1, 0.9, prompts, 8)):
        with pytest.raises(UserError, match=r"^budget 0\.1 is below 0\.4, what system and text alone need"):
            Space(text="all", text_bits=(16,)).within(budget, layers)
    with pytest.raises(UserError, match=r"^read budget 0\.3 is below 0\.4, what system, text"):
        Space(text="all", text_bits=(16,)).within(Budget(0.7, 0.3, prompts, 8), layers)
    # without 'never' the least is one refresh in 8 steps: 0.4 + (0.7 - 0.4) / 8
    with pytest.raises(UserError, match=r"^read budget 0\.42 is below 0\.438"):
        Space(refreshes=(1, 8), text="all", text_bits=(16,)).within(Budget(0.7, 0.42, prompts, 8), layers)
    assert Space(text="all", text_bits=(16,)).within(Budget(0.7, 0.42, prompts, 8), layers).refreshes == (
        0,
        16,
        32,
    )
    assert Space(refreshes=(1, 8), text="all", text_bits=(16,)).within(
        Budget(0.7, 0.438, prompts, 8), layers
    ).refreshes == (8,)


def test_starts_are_points_of_the_space():
    starts = Space().starts()
    assert starts[:5] == [Candidate(vision_bits=bits, text_bits=16) for bits in (16, 8, 4, 3, 2)]
    assert starts[5:8] == [Candidate(vision_bits=4, text_bits=bits) for bits in (8, 4, 3)]
    assert {(start.vision_bits, start.text_bits) for start in starts[8:]} == {(4, 4)}
    assert {start.text_bits for start in Space(text_bits=(16,)).starts()} == {None}
    assert Space(bits=(16,), text_bits=(16,)).starts()[0] == Candidate()
    assert {start.vision_bits for start in Space(bits=(8, 2)).starts()[1:]} == {8, 2}
    assert {start.allocator for start in starts} == set(Space().allocators)
    assert {start.scorer for start in starts} == set(Space().scorers)
    assert len(set(starts)) == len(starts)
    small = Space(
        *(("pyramid", "uniform"), ("value_norm",), ("kv_head",), (0, 16, 32)), bits=(16,), text_bits=(16,)
    )
    assert [(s.allocator, s.scorer, s.heads, s.refresh_interval) for s in small.starts()] == [
        ("uniform", "value_norm", "kv_head", 16),
        ("pyramid", "value_norm", "kv_head", 16),
    ]
    assert Space(refreshes=(0, 2, 4)).starts()[0].refresh_interval == 4
    static = [start for start in replace(Space(), reads=True).starts() if start.refresh_interval == 0]
    assert [start.scorer for start in static] == list(Space().scorers)
    limited = replace(Space(), reads=True).starts()
    assert len(limited) == len(starts) + len(static) + 4
    assert {(start.core_prompt, start.core_memory) for start in limited[:-4]} == {(0.0, 0.0)}
    last = limited[-4:]
    assert {(one.refresh_interval, one.refresh, one.core_prompt) for one in last} == {(4, "score_only", 0.5)}
    assert [(one.leading, one.leading_interval) for one in last] == [(n, 1) for n in range(4)]
    assert {one.leading for one in limited[:-4]} == {0}
    assert {one.leading for one in starts} == {None}
    plain = replace(Space(core_prompts=(0.0,), core_memories=(0.0,)), reads=True)
    assert {start.core_prompt for start in plain.starts()} == {None}
    window = Space(text="trade").starts()
    assert {(start.text_share, start.packs_text) for start in window} == {
        *((1.0, False), (0.25, False), (None, True)),
    }


def test_smaller_pictures_are_searched_where_they_are_offered():
    plain, space = Space(), Space(pictures=("resized", "whole", "pooled"), picture_shares=(0.3, 0.6))
    assert (space.pictures, space.picture_shares) == (PICTURES, (0.6, 0.3))
    assert {(start.pictures, start.picture_share) for start in plain.starts()} == {(None, 1.0)}
    added = [start for start in space.starts() if start.pictures != "whole"]
    assert [(one.pictures, one.picture_share, one.vision_bits) for one in added] == [
        ("pooled", 0.6, 4), ("resized", 0.6, 4)
    ]  # fmt: skip
    rest = [replace(start, pictures=None) for start in space.starts() if start not in added]
    assert rest == plain.starts()
    budget = Budget(0.3, None, (PromptShape(1, 60, 6, grids=((6, 10),)),), 4)
    for space_, start in ((plain, plain.starts()[0]), (space, space.starts()[0]), (space, added[1])):
        asked = start.params(budget)
        trial = FixedTrial(asked)
        assert space_.suggest(trial, budget) == start and set(trial.params) == set(asked)
    assert not {"pictures", "picture_share"} & set(plain.starts()[0].params(budget))
    # whole pictures, and those made smaller to all of their tokens, are the policy without the field
    evidence, start = probed_evidence(3, 60, 1), Candidate("pyramid", scorer="instruction")
    whole = start.policy(evidence, budget)
    assert replace(start, pictures="whole").policy(evidence, budget) == whole
    assert replace(start, pictures="pooled").policy(evidence, budget).hash == whole.hash
    # what a neighbouring budget found is taken over as far as it is on offer
    more = (replace(start, pictures="pooled", picture_share=0.35),)
    taken = [one.starts()[-1] for one in (replace(space, more_starts=more), replace(plain, more_starts=more))]
    assert [(one.pictures, one.picture_share) for one in taken] == [("pooled", 0.3), (None, 1.0)]


@pytest.mark.parametrize("refine", [None, 0, 7])
@pytest.mark.parametrize("starts", [1, 2, 17, 22, 30])
def test_too_few_trials_for_the_starts_are_told_with_what_is_enough(starts, refine):
    said = Settings(trials=8, refine=refine).missed(40)
    assert said.startswith(f"only {8 - Settings(trials=8, refine=refine).refining} of 40 starts are run")
    for trials in range(8, 80):
        settings = Settings(trials=trials, refine=refine)
        said, scalar = settings.missed(starts), trials - settings.refining
        assert bool(said) == (scalar <= starts)
        if said:
            enough = int(said.split("proposes nothing: ")[1].split(" trials or more")[0])
            assert not Settings(trials=enough, refine=refine).missed(starts)
            assert Settings(trials=enough - 1, refine=refine).missed(starts)


def test_starts_of_another_budget_are_brought_into_reach():
    """What another budget's winner holds may not be on offer here."""
    more = (
        Candidate("pyramid", mix=0.3, scorer="value_norm", refresh_interval=3, text_share=0.5),
        Candidate("coverage"),
        Candidate("strength"),
    )
    space = replace(SPACE, refreshes=(0, 4, 16), scorers=("last_query", "instruction"), more_starts=more)
    added = space.starts()[len(replace(space, more_starts=()).starts()) :]
    assert [(c.allocator, c.mix, c.scorer, c.refresh_interval, c.text_share) for c in added] == [
        ("pyramid", 0.3, "last_query", 4, None)
    ]
    assert space.described() == replace(space, more_starts=()).described()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"read_budget": -0.1}, r"read_budget must be in \[0, 1\].*got -0.1"),
        ({"trials": 0}, "trials must be 1 or more, got 0"),
        ({"samples": 1}, "samples must be 2 or more, got 1"),
        ({"proof_samples": 1}, "proof_samples must be 2 or more, got 1"),
        ({"finalists": 0}, "finalists must be 1 or more"),
        ({"objective": "kl"}, "unknown objective 'kl'; known: accuracy, fidelity, likelihood"),
        ({"sampler": "tpee"}, "unknown sampler 'tpee'; did you mean tpe"),
        ({"margin": 0.0}, "margin must be above 0 and below 1.*got 0.0"),
        ({"trials": 5, "refine": 5}, r"refine must be 0 or more and below trials \(5\), got 5"),
        ({"seed": -1}, "seed must be in"),
        ({"max_new_tokens": 1}, "max_new_tokens must be 2 or more, got 1; the first token"),
        ({"proof_split": "search"}, "split and proof_split must differ"),
    ],
)
def test_settings_refuse(values, said):
    with pytest.raises(UserError, match=said):
        Settings(**values)


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan")])
def test_a_budget_is_a_share(share):
    with pytest.raises(UserError, match=rf"^budget must be in \[0, 1\].*got {share}"):
        check_budget("budget", share)


def test_a_space_comes_back_from_its_description():
    shown = Space(pictures=("whole", "pooled"), picture_shares=(0.5, 0.25))
    for space in (Space(), SPACE, shown, Space(("uniform",), refreshes=(0, 8), text="trade")):
        assert Space.of(space.described()) == space
    told = {"allocators": ("uniform",), "of a later version": (1,)}
    rows = {"core_prompts": (0.0,), "core_memories": (0.0,), "leaders": (0,)}
    plain = Space(("uniform",), bits=(16,), text_bits=(16,), **rows)
    assert Space.of(told) == plain, "one that tells of no bits and no scores searched none"
    assert Space.of(told | {"bits": (4, 2)}) == replace(plain, bits=(4, 2))
    assert Space.of(told | {"text_bits": (16, 3)}) == replace(plain, text_bits=(16, 3))
    assert Space.of(told | {"core_prompts": (0.0, 0.3)}) == replace(plain, core_prompts=(0.0, 0.3))
    assert not {"bits", "text_bits", "pictures", "picture_shares", *rows} & set(plain.described())
    assert Space(bits=(4, 16, 4)) == Space(bits=(16, 4)), "the same choices, whatever their order"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"allocators": ("unifrom",)}, "unknown allocator 'unifrom'; did you mean uniform"),
        ({"scorers": ("last_qery",)}, "unknown scorer 'last_qery'; did you mean last_query"),
        ({"heads": ("all",)}, "unknown kind of heads 'all'"),
        ({"heads": ("adaptive", "all")}, "unknown kind of heads 'all'"),
        ({"refreshes": (-1,)}, "refreshes of the search space must be 0 or more, got -1"),
        ({"leaders": (-1,)}, "leaders of the search space must be 0 or more, got -1"),
        ({"refresh": ("now",)}, "unknown kind of refresh 'now'"),
        ({"scorers": ()}, "scorers of the search space must name at least one"),
        ({"scorers": ("valued:instrction",)}, "unknown scorer 'instrction'; did you mean instruction"),
        ({"refresh": ("half",)}, "unknown kind of refresh 'half'"),
        ({"bits": (4, 5)}, "bits of the search space must be among 16, 8, 4, 3, 2, got 5"),
        ({"text_bits": (16, 1)}, "text_bits of the search space must be among 16, 8, 4, 3, 2, got 1"),
        ({"core_prompts": (0.5, 1.5)}, r"core_prompts of the search space must be in \[0, 1\], got 1.5"),
        ({"core_memories": (1.0,)}, "core_memories of the search space must be in .0, 0.999., got 1.0"),
        ({"pictures": ("pooled", "blurred")}, "unknown way of showing pictures 'blurred'"),
        ({"picture_shares": (0.5, 1.0)}, "picture_shares of the search space must be above 0 and below 1"),
        ({"text": "none"}, "unknown text of the search space 'none'"),
    ],
)
def test_space_refuses(values, said):
    with pytest.raises(UserError, match=said):
        Space(**values)


# --- the sensitivity allocator ---


def best_sum(table, total):
    """Least sum of damages over all ways to give `total` units to the rows of a table, by enumeration."""
    ways = itertools.product(range(table.shape[1]), repeat=table.shape[0])
    return min(sum(row[k] for row, k in zip(table, way, strict=True)) for way in ways if sum(way) == total)


def units(table, total):
    """The allocator's units per row on a grid of the table's columns."""
    layers, levels = table.shape[0], np.linspace(0, 1, table.shape[1])
    evidence = replace(
        random_evidence(layers, 40, np.random.default_rng(0)), damage=table, damage_levels=levels
    )
    shares = Sensitivity().shares(evidence, total / (layers * (table.shape[1] - 1)))
    return shares * (table.shape[1] - 1)


@pytest.mark.parametrize("seed", range(12))
def test_sensitivity_is_the_optimum_of_a_convex_table(seed):
    rng = np.random.default_rng(seed)
    layers, steps = int(rng.integers(2, 5)), 5
    gains = -np.sort(-rng.exponential(size=(layers, steps)), axis=1)
    table = np.concatenate([gains[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((layers, 1))], axis=1)
    for total in range(layers * steps + 1):
        given = units(table, total)
        assert given.sum() == pytest.approx(total)
        np.testing.assert_allclose(given, given.round(), atol=1e-9)
        found = sum(table[row, round(k)] for row, k in enumerate(given))
        assert found == pytest.approx(best_sum(table, total))


@pytest.mark.parametrize("seed", range(6))
def test_sensitivity_takes_measured_noise(seed):
    """With rows that rise and bend the wrong way: between the optimum of their hulls and of uniform."""
    rng = np.random.default_rng(seed)
    table = rng.exponential(size=(3, 6))
    table[:, -1] = 0.0
    before = np.zeros(3)
    for total in range(16):
        given = units(table, total)
        assert given.sum() == pytest.approx(total)
        assert ((given >= before - 1e-9) & (given <= 5 + 1e-9)).all()
        before = given
    convex = np.array([hull(row) for row in table])
    for total in (3, 7, 12):
        ours = sum(np.interp(k, range(6), row) for row, k in zip(convex, units(table, total), strict=True))
        assert ours <= best_sum(convex, total) + 1e-9


def hull(row):
    """Greatest convex function below a row: the least over all chords, and never above what came before."""
    low = np.minimum.accumulate(row)
    return [
        min(
            low[a] if a == b else low[a] + (low[b] - low[a]) * (i - a) / (b - a)
            for a in range(i + 1)
            for b in range(i, len(row))
        )
        for i in range(len(row))
    ]


def test_sensitivity_without_damage_still_meets_the_target():
    for total in range(16):
        given = units(np.zeros((3, 6)), total)
        assert given.sum() == pytest.approx(total)
        assert given.max() <= 5
