"""Models that policies govern in part: what is predicted is what the cache holds, through the whole loop."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

import avlprof
from avlprof import plots
from avlprof.allocators import ALLOCATORS
from avlprof.attention.gate import governed_layers
from avlprof.attention.modality import modality_map, prompt_shapes
from avlprof.attention.session import cache_argument
from avlprof.budgets import meet_budget
from avlprof.cli._describe import layer_rows
from avlprof.evaluation.compare import ComparisonSettings, compare
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.evaluation.footprint import cache_bytes, footprints
from avlprof.policy import Policy, ScorerSpec, TextPolicy, live_share, read_share, sizes
from avlprof.report.policies import policy_part
from avlprof.tasks import load_task
from avlprof.testing.types import tiny_inputs, tiny_model, vision_ids
from avlprof.tracing.options import TraceSettings
from avlprof.tuning import Settings, Space, read_study
from tests.hybrids import STATES, WINDOWED, stateful, windowed
from tests.watching import Notes

TYPES = {
    "qwen3_5": (2,),
    "lfm2_vl": (1, 2),
    "gemma3": None,
    "gemma4": None,
    "gemma4:shared": None,
    "nemotron_h_omni": None,
    "step3p7": (0, 2),
}
QUICK = ("qwen3_5", "lfm2_vl", "gemma4:shared")


def held(model, inputs, policy):
    """The cache behind a prompt; of the stock model where there is no policy."""
    text = model.config.get_text_config(decoder=True)
    if policy is None:
        cache = DynamicCache(config=text)
        with torch.no_grad():
            model(**inputs, **{cache_argument(model): cache}, use_cache=True)
        return cache
    with avlprof.apply(model, policy) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        model(**inputs, **{cache_argument(model): cache}, use_cache=True)
    return cache


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in TYPES]
)
def test_bytes_of_the_cache_are_those_of_the_budget(name):
    """Read off tensors: nothing but the governed layers counts, and they hold what `sizes` says."""
    model = tiny_model(name)
    governed = governed_layers(model.config.get_text_config(decoder=True))
    assert governed is not None and TYPES[name] in (None, governed)
    inputs = tiny_inputs(model, batch=2)
    modality = modality_map(inputs["input_ids"], inputs.get("attention_mask"), vision_ids(model))
    rows = prompt_shapes(modality, governed)
    stock = held(model, inputs, None)
    layers = len(stock.layers)
    for text in (TextPolicy(), TextPolicy(window=2, sink=1)):
        least = live_share(Policy(vision_keep=0.0, text=text), rows, layers)
        budget = (1 + least) / 2
        keep = meet_budget([1.0 + layer for layer in range(layers)], rows, budget, text)
        policy = Policy(vision_keep=keep, text=text)
        cache = held(model, inputs, policy)
        used, dense = footprints(cache, rows), footprints(stock, rows)
        bytes_ = {
            layer: sum(t.shape[1] * t.shape[3] * 2 for t in (own.keys, own.values))
            for layer, own in ((layer, stock.layers[layer]) for layer in governed)
        }
        for row, shape in enumerate(rows):
            table = sizes(policy, shape, layers)
            assert used[row].live == sum(bytes_[layer] * table[layer].stored for layer in governed)
            assert (
                used[row].dense == dense[row].dense == dense[row].live == shape.total * sum(bytes_.values())
            )
            measured = used[row].live / used[row].dense
            assert measured == pytest.approx(live_share(policy, [shape], layers))
        total = sum(one.live for one in used) / sum(one.dense for one in used)
        assert budget - 1 / min(shape.total for shape in rows) < total <= budget
        for use in cache.use():
            stored = sum(sizes(policy, shape, layers)[use.layer].stored for shape in rows)
            assert use.prompt == stored * bytes_[use.layer]
    assert cache_bytes(stock) > sum(one.dense for one in dense)


SAMPLES, LIMIT = 3, 5


@pytest.fixture(scope="module", params=["windowed", "stateful"])
def traced(request, tiny, tmp_path_factory):
    """A hybrid with the embedded model's processor, its kinds of layers, and a run of it."""
    make, kinds = {"windowed": (windowed, WINDOWED), "stateful": (stateful, STATES)}[request.param]
    loaded = make(tiny)
    out = tmp_path_factory.mktemp("governed") / "run"
    run = avlprof.trace(loaded, "shapes:count", SAMPLES, TraceSettings(max_new_tokens=LIMIT), out=out)
    return loaded, kinds, run


def test_a_profile_spreads_its_budget_over_governed_layers(traced):
    loaded, kinds, run = traced
    profile = run.profile()
    own = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    assert loaded.adapter.governed == profile.governed == own
    assert all(prompt.governed == own for prompt in profile.prompts())
    for name in ALLOCATORS.names():
        if name == "sensitivity":
            continue
        policy = profile.derive(0.3, read_budget=0.2, allocator=name)
        keep, prompts = policy.keep(len(kinds)), profile.prompts()
        assert {keep[layer] for layer in range(len(kinds)) if layer not in own} == {1.0}
        assert max(keep[layer] for layer in own) < 0.5
        token = len(prompts) / sum(prompt.total for prompt in prompts)
        assert 0.3 - token < live_share(policy, prompts, len(kinds)) <= 0.3
        assert read_share(policy, prompts, len(kinds), profile.answer_tokens) <= 0.2
        assert policy.provenance.governed == own
        assert policy.provenance.measured_budget <= 0.3
    holding = profile.derive(coverage=0.9)
    assert {holding.keep(len(kinds))[layer] for layer in range(len(kinds)) if layer not in own} == {1.0}


def test_pages_and_figures_know_the_layers(traced):
    _, kinds, run = traced
    profile = run.profile()
    policy = profile.derive(0.3)
    own = list(profile.governed)
    assert [row["layer"] for row in layer_rows(policy, len(kinds))] == own
    info = plots.policy_layers_info(policy)
    assert info.drawn == own
    figure = plots.policy_layers(policy)
    bars = [bar for bar in figure.axes[0].patches if bar.get_height()]
    assert sorted({round(bar.get_x() + bar.get_width() / 2) for bar in bars}) == own
    assert figure.axes[0].get_ylim()[1] < 0.6  # the others' 100% would have made it 1
    facts = dict(policy_part(policy, profile).facts)
    assert facts["Layers"].startswith(f"budgets and shares are of the KV of {len(own)} of 5 layers")
    assert plots.policy_layers_info(Policy(vision_keep=(0.2,) * 5)).drawn == list(range(5))


def test_evaluated_shares_are_those_of_governed_layers(traced):
    loaded, _, run = traced
    policy = run.profile().derive(0.3, read_budget=0.2)
    task, notes = load_task("shapes:count"), Notes()
    settings = EvaluationSettings(
        samples=2, max_new_tokens=LIMIT, baselines=True, latency=False, fidelity=False, batch_size=2
    )
    evaluation = evaluate(loaded, task, [policy], settings, watch=notes)
    table = evaluation.summary().set_index("policy")
    assert table.loc["dense", "live_share"] == 1.0
    rows = table.drop("dense")
    assert len(rows) >= 2
    assert (rows["live_share"] <= 0.3).all() and (rows["live_share"] > 0.29).all()
    assert evaluation.meta["governed"] == list(run.profile().governed)
    assert any("layers" in line for line in notes.sentences)


def test_methods_are_compared_at_equal_bytes_of_governed_layers(traced):
    loaded, kinds, run = traced
    policy = Policy(name="even", vision_keep=0.9, scorer=ScorerSpec(name="value_norm"))
    pyramid = Policy(name="by depth", vision_keep=0.5, allocator={"name": "pyramid"})
    settings = ComparisonSettings(
        samples=2, max_new_tokens=LIMIT, batch_size=2, baselines=[policy, pyramid], select_split=None
    )
    compared = compare(loaded, load_task("shapes:count"), [0.3], settings=settings)
    table = compared.summary().set_index("method").drop("dense")
    assert set(table.index) == {"even", "by depth"}
    assert ((table["live_share"] <= 0.3) & (table["live_share"] > 0.29)).all()
    own = run.profile().governed
    by_depth = next(entry.policy for entry in compared.lineup.entries if entry.method == "by depth")
    kept = [by_depth.keep(len(kinds))[layer] for layer in own]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]


@pytest.mark.full  # a whole search
def test_a_search_tunes_governed_layers_alone(tiny, tmp_path):
    loaded = windowed(tiny)
    run = avlprof.trace(loaded, "shapes:count", 3, TraceSettings(max_new_tokens=LIMIT), out=tmp_path / "run")
    settings = Settings(
        read_budget=0.2, trials=6, refine=3, samples=3, proof_samples=2, max_new_tokens=LIMIT,
        space=Space(("uniform", "sensitivity", "coverage"), ("last_query",), ("shared",), (0, 2)),
    )  # fmt: skip
    tuned = avlprof.tune(loaded, "shapes:count", 0.3, settings, run=run, out=tmp_path / "study")
    own = (1, 3, 4)
    assert tuned.policy.provenance.governed == own
    assert tuned.policy.provenance.measured_budget <= 0.3
    assert {tuned.policy.keep(5)[layer] for layer in (0, 2)} == {1.0}
    refined = next((tmp_path / "study" / "refined").iterdir())
    for trial in read_study(refined).get_trials():
        assert {name for name in trial.params if name.startswith("keep_")} == {f"keep_{i}" for i in own}
        assert {name for name in trial.params if name.startswith("compute_")} == {f"compute_{i}" for i in own}
    for trial in read_study(tmp_path / "study").get_trials():
        assert 0.28 < trial.user_attrs["live_share"] <= 0.3
        assert trial.user_attrs["read_share"] <= 0.2
    summary = tuned.proof.summary().set_index("policy").drop("dense")
    assert (summary["live_share"] <= 0.31).all()
