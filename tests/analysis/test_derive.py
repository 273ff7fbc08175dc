from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avlprof.allocators import ALLOCATORS, Evidence
from avlprof.analysis import Profile, Spread
from avlprof.analysis.derive import leading_layers
from avlprof.errors import UserError
from avlprof.policy import (
    Policy,
    PromptShape,
    TextPolicy,
    dump_policy,
    live_share,
    parse_policy,
    read_share,
    tokens,
)
from avlprof.testing.allocators import random_evidence
from tests.synthetic_run import LAYERS, write_run

VISION = (37, 60, 60, 44)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return Profile.from_run(write_run(tmp_path_factory.mktemp("derive") / "run", VISION, seed=4))


def a_token_a_layer(prompts: list[PromptShape]) -> float:
    return len(prompts) / sum(prompt.total for prompt in prompts)


FROM_A_PROFILE = [name for name in ALLOCATORS.names() if name != "sensitivity"]


@pytest.mark.parametrize("allocator", FROM_A_PROFILE)
@pytest.mark.parametrize("budget", [0.3, 0.5, 1.0])
def test_a_budget_is_met(profile: Profile, allocator: str, budget: float) -> None:
    policy = profile.derive(budget=budget, allocator=Spread(allocator, mix=1.0))
    prompts = profile.prompts()
    used = live_share(policy, prompts, LAYERS)
    assert budget - a_token_a_layer(prompts) < used <= budget
    assert policy.vision_compute is None
    assert policy.text.keeps_all
    assert policy.layers == LAYERS
    assert min(policy.keep(LAYERS)) >= 0.01


@pytest.mark.parametrize("allocator", FROM_A_PROFILE)
def test_every_allocator_gives_compute_shares_at_a_read_budget(profile: Profile, allocator: str) -> None:
    policy = profile.derive(
        budget=0.6, read_budget=0.45, allocator=Spread(allocator, mix=1.0), refresh_interval=4
    )
    prompts = profile.prompts()
    assert policy.vision_compute is not None
    read = read_share(policy, prompts, LAYERS, profile.answer_tokens)
    assert 0.45 - a_token_a_layer(prompts) < read <= 0.45
    assert live_share(policy, prompts, LAYERS) <= 0.6
    assert all(c <= k for c, k in zip(policy.compute(LAYERS), policy.keep(LAYERS), strict=True))


def test_sensitivity_is_left_to_tune(profile: Profile) -> None:
    with pytest.raises(UserError, match="needs a sensitivity probe, which 'avlprof tune' runs"):
        profile.derive(budget=0.5, allocator="sensitivity")


def test_knobs_reach_the_allocator(profile: Profile) -> None:
    def keep(**options: float) -> tuple[float, ...]:
        policy = profile.derive(budget=0.5, allocator=Spread("sigmoid", options, mix=1.0))
        return policy.keep(LAYERS)

    flat, steep = keep(steepness=0.0), keep(midpoint=0.5, steepness=50.0)
    assert np.ptp(flat) <= 1 / 60 + 1e-6
    assert min(steep[:2]) > max(steep[2:])
    with pytest.raises(UserError, match="takes no options, got 'steepness'"):
        profile.derive(budget=0.5, allocator=Spread("coverage", {"steepness": 1.0}))


@pytest.mark.parametrize("interval", [None, 0, 3, 16])
def test_both_budgets_are_met(profile: Profile, interval: int | None) -> None:
    policy = profile.derive(budget=0.6, read_budget=0.45, refresh_interval=interval)
    prompts, steps = profile.prompts(), profile.answer_tokens
    assert live_share(policy, prompts, LAYERS) <= 0.6
    read = read_share(policy, prompts, LAYERS, steps)
    assert 0.45 - a_token_a_layer(prompts) < read <= 0.45
    if interval is not None:
        assert policy.refresh_interval == interval
    assert all(c <= k for c, k in zip(policy.compute(LAYERS), policy.keep(LAYERS), strict=True))


def test_a_read_budget_that_does_not_bind_leaves_no_core(profile: Profile) -> None:
    policy = profile.derive(budget=0.5, read_budget=0.9)
    assert policy.vision_compute is None
    assert policy.refresh_interval == 0


def test_the_layer_that_needs_more_keeps_more(profile: Profile) -> None:
    evidence = profile.evidence("store")
    assert evidence.coverage is not None
    need = [int((row < 0.8).sum()) for row in evidence.coverage]
    keep = profile.derive(budget=0.5, allocator=Spread(mix=1.0)).keep(LAYERS)
    assert keep[int(np.argmax(need))] == max(keep)
    assert keep[int(np.argmin(need))] == min(keep)
    mild = profile.derive(budget=0.5, allocator=Spread(mix=0.2)).keep(LAYERS)
    flat = profile.derive(budget=0.5, allocator=Spread(mix=0.0)).keep(LAYERS)
    assert np.ptp(flat) <= 1 / 60 + 1e-6
    assert np.ptp(flat) <= np.ptp(mild) <= np.ptp(keep)


def test_coverage_holds_its_share_of_vision_and_text(profile: Profile) -> None:
    policy = profile.derive(coverage=0.9)
    curves = profile["coverage_curve"].pivot(index=["query", "layer"], columns="share_kept", values="mean")

    def held(query: str, layer: int, ratio: float) -> float:
        row = curves.loc[(query, layer)]
        count = tokens(ratio, 60)
        return float(row.iloc[count - 1]) if count else 0.0

    for layer in range(LAYERS):
        kept, core = policy.keep(LAYERS)[layer], policy.compute(LAYERS)[layer]
        assert core <= kept
        assert min(held("last", layer, kept), held("answer", layer, kept)) >= 0.9 - 1e-9
        assert min(held("last", layer, kept - 1 / 60), held("answer", layer, kept - 1 / 60)) < 0.9
        assert held("step", layer, core) >= 0.9 - 1e-9 or core == kept
        assert held("step", layer, core - 1 / 60) < 0.9
        assert isinstance(policy.text.window, tuple)
        text = profile["window_curve"].query("layer == @layer and query == 'generated'")
        enough = text[text["mean"] >= 0.9]["distance"].min()
        assert policy.text.window[layer] == enough
    assert policy.text.sink == profile.meta.settings.text_sink
    assert policy.refresh_interval == 8, "overlaps are 0.65 on average at every lag, the longest is 8"
    everything = profile.derive(coverage=1.0)
    assert everything.keep(LAYERS)[0] == 1.0


def test_provenance_says_where_it_comes_from(profile: Profile) -> None:
    policy = profile.derive(budget=0.5, read_budget=0.4, name="mine", scorer="accumulated")
    made = policy.provenance
    assert made is not None
    settings = profile.meta.settings
    assert made.made_by.startswith("avlprof derive ")
    assert (made.model, made.model_revision, made.model_hash) == ("random", "r1", "h1")
    assert (made.task, made.samples, made.seed) == ("noise", 4, settings.seed)
    assert (made.run, made.run_hash) == (profile.meta.run, profile.meta.run_hash)
    assert (made.budget, made.read_budget, made.answer_tokens) == (0.5, 0.4, profile.answer_tokens)
    assert made.measured_budget == pytest.approx(live_share(policy, profile.prompts(), LAYERS), abs=1e-6)
    assert made.measured_read_budget == pytest.approx(
        read_share(policy, profile.prompts(), LAYERS, profile.answer_tokens), abs=1e-6
    )
    assert set(made.versions) >= {"torch", "avlprof"}
    assert policy.name == "mine"
    assert policy.scorer.name == "accumulated"


@pytest.mark.parametrize("options", [{"budget": 0.4}, {"budget": 0.6, "read_budget": 0.4}, {"coverage": 0.8}])
def test_survives_yaml(profile: Profile, options: dict[str, float]) -> None:
    policy = profile.derive(**options)
    assert parse_policy(dump_policy(policy)) == policy
    assert Policy.model_validate(policy.model_dump(by_alias=True)) == policy


def test_a_text_window_makes_a_small_budget_feasible(profile: Profile) -> None:
    with pytest.raises(UserError, match="what system and text alone need") as caught:
        profile.derive(budget=0.15)
    enough = float(str(caught.value).split("below ")[1].split(",")[0])
    assert profile.derive(budget=enough)
    windowed = profile.derive(budget=0.15, text=TextPolicy(window=2))
    assert live_share(windowed, profile.prompts(), LAYERS) <= 0.15


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "give either budget or coverage to derive a policy, got neither"),
        ({"budget": 0.5, "coverage": 0.9}, "got both"),
        ({"coverage": 0.9, "read_budget": 0.5}, "leave read_budget and text out"),
        ({"coverage": 1.9}, r"coverage must be in \[0, 1\], got 1.9"),
        ({"budget": -0.1}, r"budget must be in \[0, 1\], got -0.1"),
        ({"budget": 0.5, "read_budget": 7}, r"read_budget must be in \[0, 1\], got 7"),
        ({"budget": 0.5, "read_budget": 0.01}, "read budget 0.01 is below"),
        ({"budget": 0.5, "spread": {"floor": 2}}, r"floor must be in \[0, 1\], got 2"),
        ({"budget": 0.5, "spread": {"mix": -1}}, r"mix must be in \[0, 1\], got -1"),
        ({"budget": 0.5, "refresh_interval": -2}, "refresh_interval must be 0 or more steps, got -2"),
        ({"budget": 0.5, "allocator": "coverge"}, "unknown allocator 'coverge'; did you mean coverage"),
        (
            {"budget": 0.5, "scorer": "pooled:last_quary"},
            "unknown scorer 'last_quary'; did you mean last_query",
        ),
        ({"budget": 0.5, "scorer": "last_quary"}, "unknown scorer 'last_quary'; did you mean last_query"),
    ],
)
def test_bad_options_are_one_sentence(profile: Profile, options: dict[str, object], problem: str) -> None:
    spread = options.pop("spread", None)
    with pytest.raises(UserError, match=problem):
        profile.derive(**options, **({"allocator": Spread(**spread)} if spread else {}))


def test_a_run_without_pictures_is_refused(tmp_path: Path) -> None:
    blind = Profile.from_run(write_run(tmp_path / "run", (0, 0)))
    for options in ({"budget": 1.0}, {"coverage": 0.9}):
        with pytest.raises(UserError, match="no vision tokens"):
            blind.derive(**options)


def test_a_run_without_decoding_has_one_level(tmp_path: Path) -> None:
    still = Profile.from_run(write_run(tmp_path / "run", (20, 25), decode=False))
    policy = still.derive(coverage=0.9)
    assert policy.vision_compute is None
    assert policy.refresh_interval == 0


def test_heads_get_what_their_coverage_needs(tmp_path: Path) -> None:
    """Against a plain mean over samples and query heads of what holds 90% of a head's vision attention."""
    run = write_run(tmp_path / "run", (40, 31, 25), kv_heads=2, per_head=True)
    profile = Profile.from_run(run)
    policy = profile.with_heads(profile.derive(0.5, name="mine"), "adaptive")
    assert parse_policy(dump_policy(policy)) == policy
    assert (policy.name, policy.heads, policy.head_floor, policy.layers) == ("mine", "adaptive", 1.0, 4)
    stats, vision = run.stats(), run.samples().set_index("sample")["vision"]
    for layer, shares in enumerate(policy.head_shares or ()):
        needs = []
        for head in range(2):
            own = stats.query(f"layer == {layer} and head == {head} and query == 'text'")
            each = own["coverage_90"] / own["sample"].map(vision)
            needs.append(max(float(each.mean()), 0.0))
        wanted = np.array(needs) / np.mean(needs)
        np.testing.assert_allclose(shares, wanted, atol=2e-3)
    assert live_share(policy, profile.prompts(), 4) == live_share(profile.derive(0.5), profile.prompts(), 4)
    assert profile.with_heads(profile.derive(0.5), "kv_head").heads == "kv_head"
    with pytest.raises(UserError, match="beside vision_compute"):
        profile.with_heads(profile.derive(0.5, read_budget=0.45), "adaptive")
    with pytest.raises(UserError, match="unknown kind of heads 'each'"):
        profile.with_heads(profile.derive(0.5), "each")  # type: ignore[arg-type]


def test_a_run_of_averages_says_nothing_of_heads(profile: Profile, tmp_path: Path) -> None:
    averaged = Profile.from_run(write_run(tmp_path / "run", (20, 31), averaged=True))
    with pytest.raises(UserError, match="trace with per_head"):
        averaged.with_heads(averaged.derive(0.5), "adaptive")


@pytest.mark.parametrize("seed", range(6))
def test_who_leads_is_the_best_of_all_choices(seed: int) -> None:
    """Against all choices, one by one; layers before the first that leads share nothing."""
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 8))
    evidence = random_evidence(layers, 9, rng)
    own = sorted(rng.choice(layers, size=int(rng.integers(1, layers + 1)), replace=False).tolist())
    if seed % 2:
        evidence = replace(evidence, governed=tuple(own))
    else:
        own = list(range(layers))
    assert evidence.overlap is not None

    def shared(leads: tuple[int, ...]) -> float:
        followed = [(max((lead for lead in leads if lead <= layer), default=None), layer) for layer in own]
        return sum(float(evidence.overlap[lead, layer]) for lead, layer in followed if lead is not None)

    for count in range(1, len(own) + 1):
        found = leading_layers(evidence, count)
        choices = list(itertools.combinations(own, count))
        assert found in choices
        assert shared(found) == pytest.approx(max(map(shared, choices)))
    for count in (0, len(own) + 1):
        with pytest.raises(UserError, match=f"from 1 to {len(own)} layers can lead, got {count}"):
            leading_layers(evidence, count)
    assert leading_layers(flat_overlap(layers), 1) == (0,)
    with pytest.raises(UserError, match="recorded no decoding step"):
        leading_layers(replace(evidence, overlap=None), 1)


def flat_overlap(layers: int) -> Evidence:
    """Layers that share the same with each other, so that the earliest leads."""
    return Evidence(layers, 9, overlap=np.full((layers, layers), 0.5) + np.eye(layers) / 2)


def test_evidence_has_the_overlap_of_layers_at_one_step(profile: Profile) -> None:
    table = profile["overlap"].query("query == 'step'")
    overlap = profile.evidence().overlap
    assert overlap is not None and overlap.shape == (LAYERS, LAYERS)
    for row in table.itertuples():
        assert (
            overlap[row.layer_a, row.layer_b] == overlap[row.layer_b, row.layer_a] == pytest.approx(row.mean)
        )
    assert np.diag(overlap).tolist() == [1.0] * LAYERS
