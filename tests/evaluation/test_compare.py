"""Policies at equal bytes: scaling, line-up, the strongest baseline, the table and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import avlprof
from avlprof.allocators._base import Evidence
from avlprof.budgets import meet_budget
from avlprof.budgets.scale import OverBudgetError, scale_to
from avlprof.cli.compare import app
from avlprof.errors import UserError
from avlprof.evaluation import (
    AnswerSettings,
    AnswerStore,
    Comparison,
    ComparisonSettings,
    LineUp,
    generate_answers,
    line_up,
    strongest,
)
from avlprof.evaluation.compare import compare
from avlprof.evaluation.lineup import SMALLER, LeftOut
from avlprof.evaluation.submission import read_submission
from avlprof.plots.budgets import budgets_info, quality_by_budget
from avlprof.policy import (
    JointPool,
    Policy,
    PrefillFilter,
    PromptShape,
    Provenance,
    ScorerSpec,
    TextPolicy,
    find_policy,
    live_share,
    save_policy,
    shipped,
    sizes,
)
from avlprof.tasks import Sample, Task, load_task
from tests.watching import Counted

LAYERS = 5
BASELINES = sorted(name for name in shipped() if "/" not in name)
SHAPED = Policy(
    name="shaped", vision_keep=(0.8, 0.4, 0.2, 0.2, 0.1), vision_compute=(0.4, 0.1, 0.2, 0.1, 0.0)
)
POOL = Policy(
    name="pool",
    pool="joint",
    scorer=ScorerSpec(name="position"),
    joint=JointPool(keep=(0.5, 0.4, 0.3, 0.2, 0.1)),
)
FASTV = Policy(name="fastv", prefill_filter=(PrefillFilter(after_layer=2, keep=0.5),))
STEPS = Policy(
    name="steps",
    vision_keep=0.5,
    vision_compute=0.25,
    prefill_filter=(PrefillFilter(after_layer=1, keep=0.5), PrefillFilter(after_layer=3, keep=0.2)),
)
WINDOWED = SHAPED.model_copy(update={"name": "windowed", "text": TextPolicy(window=3, sink=1)})

shapes = st.builds(PromptShape, st.integers(0, 9), st.integers(1, 60), st.integers(1, 12))


# -- scale_to ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from([SHAPED, POOL, FASTV, STEPS, WINDOWED]),
    prompts=st.lists(shapes, min_size=1, max_size=6),
    budget=st.floats(0.02, 1.0),
)
def test_never_above_and_at_most_one_token_a_layer_below(
    policy: Policy, prompts: list[PromptShape], budget: float
) -> None:
    floor = least(policy, prompts)
    if budget < floor:
        with pytest.raises(OverBudgetError) as refused:
            scale_to(policy, budget, prompts, LAYERS)
        assert refused.value.floor == pytest.approx(floor)
        return
    scaled = scale_to(policy, budget, prompts, LAYERS)
    used = live_share(scaled, prompts, LAYERS)
    assert used <= budget
    full = most(scaled, prompts)
    one_each = LAYERS * len(prompts) / (LAYERS * sum(prompt.total for prompt in prompts))
    assert used > min(budget, full) - one_each - 1e-12
    Policy.model_validate(scaled.model_dump(by_alias=True))


def least(policy: Policy, prompts: list[PromptShape]) -> float:
    """The share with no vision token in any layer that may drop them all (or one token, in a pool)."""
    if policy.joint:
        return live_share(policy.model_copy(update={"joint": JointPool(keep=0.0)}), prompts, LAYERS)
    free = [0.0] * LAYERS
    if policy.name == "fastv":
        free[:2] = [1.0, 1.0]
    return live_share(Policy(vision_keep=tuple(free), text=policy.text), prompts, LAYERS)


def most(policy: Policy, prompts: list[PromptShape]) -> float:
    """The share with all vision tokens in all layers."""
    return 1.0 if policy.joint else live_share(Policy(vision_keep=1.0, text=policy.text), prompts, LAYERS)


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.7, 0.95])
def test_a_plain_split_policy_is_refitted_as_the_allocators_do(budget: float) -> None:
    prompts = [PromptShape(4, 49, 8), PromptShape(4, 98, 11), PromptShape(2, 49, 6)]
    scaled = scale_to(SHAPED, budget, prompts, LAYERS)
    assert scaled.vision_keep == meet_budget(SHAPED.keep(LAYERS), prompts, budget)
    assert scaled.refresh_interval == SHAPED.refresh_interval
    for new, core, keep, compute in zip(
        scaled.keep(LAYERS), scaled.compute(LAYERS), SHAPED.keep(LAYERS), SHAPED.compute(LAYERS), strict=True
    ):
        assert core <= new
        assert abs(int(core * 98 + 1e-6) - int(new * 98 + 1e-6) * compute / keep) < 1.0


def test_policy_at_its_own_budget_is_left_alone() -> None:
    prompts = [PromptShape(4, 49, 8), PromptShape(4, 49, 11)]
    for policy in (SHAPED, POOL, STEPS):
        once = scale_to(policy, 0.55, prompts, LAYERS)
        assert scale_to(once, 0.55, prompts, LAYERS) == once
        assert once.hash != policy.hash
        assert once.name == policy.name


def test_filter_lets_through_what_later_layers_hold_and_earlier_layers_stay_whole() -> None:
    prompts = [PromptShape(4, 50, 6)]
    scaled = scale_to(FASTV, 0.6, prompts, LAYERS)
    held = [size.vision for size in sizes(scaled, prompts[0], LAYERS)]
    assert held[:2] == [50, 50]
    behind = (0.6 * 60 - 10) * LAYERS - 100
    assert behind - 1 < sum(held[2:]) <= behind
    assert max(held[2:]) - min(held[2:]) <= 1
    assert int(scaled.prefill_filter[0].keep * 50 + 1e-6) == max(held[2:])
    with pytest.raises(OverBudgetError, match=r"budget 0\.4 is below 0\.5, the least that policy 'fastv'"):
        scale_to(FASTV, 0.4, prompts, LAYERS)


def test_steps_of_a_filter_stay_in_proportion() -> None:
    scaled = scale_to(STEPS, 0.3, [PromptShape(0, 1000, 10)], LAYERS)
    keep, (first, second) = scaled.keep(LAYERS), scaled.prefill_filter
    assert [round(share / keep[0], 2) for share in keep] == [1, 1, 1, 0.4, 0.4]
    assert first.keep == max(keep[1:])
    assert second.keep == max(keep[3:])


def test_allocator_is_asked_again_at_the_budget() -> None:
    pyramid = find_policy("pyramidkv")
    prompts = [PromptShape(4, 200, 8)]
    few, many = (scale_to(pyramid, budget, prompts, LAYERS) for budget in (0.1, 0.5))
    for policy in (few, many):
        assert policy.allocator is None
        assert policy.joint is not None
        keep = policy.joint.keep
        assert isinstance(keep, tuple)
        assert list(keep) == sorted(keep, reverse=True)
        assert keep[0] > keep[-1]
    with pytest.raises(UserError, match="needs the coverage curves of a profile"):
        scale_to(find_policy("prefixkv"), 0.4, prompts, LAYERS)
    held = np.arange(1, 201) / 200
    known = Evidence(
        layers=LAYERS, tokens=200, coverage=np.stack([held ** (0.2 + 0.2 * i) for i in range(LAYERS)])
    )
    spread = scale_to(find_policy("prefixkv"), 0.4, prompts, LAYERS, known)
    assert spread.vision_keep == scale_to(spread, 0.4, prompts, LAYERS).vision_keep
    assert len(set(spread.keep(LAYERS))) > 1


@pytest.mark.parametrize("budget", [-0.1, 1.2])
def test_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(UserError, match=r"budget must be in \[0, 1\]"):
        scale_to(SHAPED, budget, [PromptShape(1, 9, 1)], LAYERS)
    with pytest.raises(UserError, match="written for 5 layers"):
        scale_to(SHAPED, 0.5, [PromptShape(1, 9, 1)], LAYERS + 1)


# -- line-up --------------------------------------------------------------------------------

PROMPTS = [PromptShape(4, 49, 8)]
SAME_NAME = {"name": "shaped"}


def test_what_cannot_be_compared_is_listed_with_its_reason() -> None:
    unknown = Policy(name="strange", scorer=ScorerSpec(name="no-such-scorer"))
    found = line_up((0.1, 0.5), PROMPTS, LAYERS, baselines=[SHAPED, POOL, unknown])
    assert {(e.method, e.budget) for e in found.entries} == {("pool", 0.1), ("pool", 0.5), ("shaped", 0.5)}
    reasons = {(item.method, item.budget): item for item in found.left_out}
    assert reasons[("shaped", 0.1)].floor == pytest.approx(12 / 61)
    assert "no-such-scorer" in reasons[("strange", 0.5)].reason
    assert len(found.entries) + len(found.left_out) == 6
    assert [e.method for e in found.at(0.5, "baseline")] == ["shaped", "pool"]
    with pytest.raises(UserError, match=r"nothing can be compared: budget 0\.1 is below 0\.197"):
        line_up((0.1,), PROMPTS, LAYERS, baselines=[SHAPED])
    with pytest.raises(UserError, match="two policies are named 'shaped'"):
        line_up(
            (0.5,), PROMPTS, LAYERS, baselines=[SHAPED], given=[POOL.model_copy(update={"name": "shaped"})]
        )


def test_tuned_policy_stands_at_its_own_budget_alone() -> None:
    tuned = [
        SHAPED.model_copy(update={"name": "tuned", "provenance": Provenance(budget=budget)})
        for budget in (0.4, 0.6)
    ]
    found = line_up((0.4, 0.5, 0.6), PROMPTS, LAYERS, baselines=[], tuned=tuned)
    assert [(e.budget, e.kind) for e in found.entries] == [(0.4, "tuned"), (0.6, "tuned")]
    assert all(
        e.policy.provenance == policy.provenance for e, policy in zip(found.entries, tuned, strict=True)
    )
    assert {item.reason for item in found.left_out} == {"was tuned at 0.4", "was tuned at 0.6"}
    with pytest.raises(UserError, match="two policies are named 'tuned'"):
        line_up((0.4,), PROMPTS, LAYERS, baselines=[], tuned=[tuned[0], tuned[0]])


def test_evidence_is_asked_for_once_and_only_when_needed() -> None:
    asked = []

    def evidence() -> Evidence:
        asked.append(1)
        return Evidence(layers=LAYERS, tokens=49)

    line_up((0.4, 0.5), PROMPTS, LAYERS, baselines=[SHAPED], evidence=evidence)
    assert not asked
    line_up((0.4, 0.5), PROMPTS, LAYERS, baselines=[SHAPED, find_policy("pyramidkv")], evidence=evidence)
    assert len(asked) == 1


# -- the model ------------------------------------------------------------------------------

LIMIT, COUNT = 8, 4
UNIFORM = Policy(name="uniform", vision_keep=0.2)
RANDOM = Policy(name="random", vision_keep=0.2, scorer=ScorerSpec(name="random"))
FIRST = Policy(name="first", vision_keep=0.2, scorer=ScorerSpec(name="position"))
MINE = FIRST.model_copy(update={"name": "mine"})


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("shapes:describe,count,where")


@pytest.fixture(scope="module")
def found(tiny, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    settings = ComparisonSettings(
        baselines=[UNIFORM, RANDOM, FIRST], samples=COUNT, batch_size=4, max_new_tokens=LIMIT
    )
    store, watch = AnswerStore(tmp_path_factory.mktemp("store")), Counted()
    table = compare(tiny, task, (0.6, 0.3), given=[MINE], settings=settings, store=store, watch=watch)
    done = [done for done, _ in watch.calls]
    assert done == sorted(done)
    runs = 1 + 2 * (1 + 3 + 1 + 1) + 2 * (1 + 3 + 1)  # dense, all methods, the candidates for the strongest
    assert watch.calls[-1] == (runs * COUNT, runs * COUNT)
    return table


@pytest.mark.full  # every answer once more
@pytest.mark.full
def test_table_has_what_generating_each_policy_gives(found: Comparison, tiny, task: Task) -> None:
    summary = found.summary()
    assert list(summary["method"][:1]) == ["dense"]
    assert list(summary["budget"][1:]) == [0.3] * 4 + [0.6] * 4
    samples = task.samples("held-out", COUNT)
    dense = answers(tiny, samples, None)
    for row in summary[summary["kind"] != "dense"].itertuples():
        policy = next(e.policy for e in found.lineup.at(row.budget) if e.method == row.method)
        seeds = [{"seed": seed} for seed in (0, 1, 2)] if row.method == "random" else [{}]
        runs = [
            policy.model_copy(update={"scorer": ScorerSpec(name=policy.scorer.name, options=options)})
            for options in seeds
        ]
        made = [answers(tiny, samples, run) for run in runs]
        scores = np.mean([[answer.score for answer in run] for run in made], axis=0)
        assert row.score == pytest.approx(scores.mean())
        assert row.vs_dense == pytest.approx((scores - [answer.score for answer in dense]).mean())
        assert row.output_tokens == pytest.approx(
            np.mean([[a.generated_tokens for a in run] for run in made])
        )
        assert row.live_bytes == pytest.approx(np.mean([a.live_bytes for a in made[0]]))
        assert row.live_share <= row.budget + 1e-9
        assert row.live_share > row.budget - 0.02
        assert row.seeds == len(seeds)
        assert row.policy_hash.split() == [run.hash for run in runs]


def answers(tiny, samples: list[Sample], policy: Policy | None):
    return generate_answers(tiny, samples, policy, AnswerSettings(LIMIT, 4))


@pytest.mark.full
def test_all_methods_of_a_budget_hold_equal_bytes(found: Comparison) -> None:
    rest = found.summary().query("kind != 'dense'")
    for _, part in rest.groupby("budget"):
        assert part["live_bytes"].nunique() == 1


@pytest.mark.full
def test_differences_are_to_the_named_method(found: Comparison) -> None:
    summary = found.summary().set_index(["budget", "method"])
    for budget in (0.3, 0.6):
        best = found.strongest[budget]
        rows = summary.loc[budget]
        assert rows["strongest"].sum() == 1
        assert rows.loc[best, "strongest"]
        for method, row in rows.iterrows():
            for name, other in (("uniform", "uniform"), ("strongest", best)):
                if method == other:
                    assert math.isnan(row[f"vs_{name}"])
                    continue
                assert row[f"vs_{name}"] == pytest.approx(row["score"] - rows.loc[other, "score"])
                assert row[f"vs_{name}_low"] <= row[f"vs_{name}"] <= row[f"vs_{name}_high"]
    assert rows.loc["mine", "score"] == rows.loc["first", "score"]


@pytest.mark.full  # every answer once more
@pytest.mark.full
def test_strongest_is_the_best_mean_on_the_split_of_selection(found: Comparison, tiny, task: Task) -> None:
    candidates = [e.policy for e in found.lineup.at(0.6, "baseline")]
    settings = ComparisonSettings(samples=COUNT, max_new_tokens=LIMIT, batch_size=4)
    picked = strongest(tiny, task, candidates, settings)
    assert picked.policy.name == found.strongest[0.6]
    by_name = dict(picked.scores)
    assert by_name[picked.policy.name] == max(by_name.values())
    assert list(by_name) == ["uniform", "random", "first"]
    plain = answers(tiny, task.samples("search", COUNT), candidates[0])
    assert by_name["uniform"] == pytest.approx(np.mean([answer.score for answer in plain]))
    with pytest.raises(UserError, match="at least one baseline"):
        strongest(tiny, task, [])


def test_comparison_resumes_from_its_answers(tiny, task: Task, tmp_path: Path, monkeypatch) -> None:
    def run() -> Comparison:
        settings = ComparisonSettings(
            baselines=[UNIFORM, RANDOM], samples=3, max_new_tokens=4, select_split=None
        )
        return compare(tiny, task, (0.5,), settings=settings, store=AnswerStore(tmp_path))

    first = run()
    monkeypatch.setattr(tiny.model, "generate", lambda *_, **__: pytest.fail("generated again"))
    again = run()
    pd.testing.assert_frame_equal(first.summary(), again.summary())
    assert again.strongest == {}
    assert again.summary()["vs_strongest"].isna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": ()}, "at least one budget"),
        ({"select_split": "held-out"}, "select_split must differ from split 'held-out'"),
        ({"split": "heldout"}, "did you mean held-out"),
    ],
)
def test_compare_names_what_is_wrong(change: dict, message: str, tiny, task: Task) -> None:
    budgets = change.pop("budgets", (0.5,))
    with pytest.raises(UserError, match=message):
        compare(
            tiny,
            task,
            budgets,
            settings=ComparisonSettings(**({"baselines": [UNIFORM], "samples": 2} | change)),
        )


@pytest.mark.full  # every baseline, at the settings that are the default
def test_the_public_calls_need_no_settings(tiny) -> None:
    """On a task of one sample: all baselines take part, or are listed with what they lack."""
    one = replace(load_task("shapes:count", max_new_tokens=2), default_samples=1)
    found = avlprof.compare(tiny, one, [0.5], given=[MINE])
    assert {"dense", "mine", "uniform", "random"} <= set(found.summary()["method"])
    smaller = {policy.name for policy in SMALLER}
    named = set(found.summary()["method"]) | set(found.left_out()["method"])
    assert named == {"dense", "mine", *BASELINES, *smaller}
    assert "needs" in found.left_out().set_index("method").loc["prefixkv", "reason"]
    assert list(avlprof.evaluate(tiny, one, [MINE]).summary()["policy"]) == ["dense", "mine"]


@pytest.mark.full
def test_files_hold_table_policies_and_what_was_left_out(found: Comparison, tmp_path: Path) -> None:
    paths = found.save(tmp_path)
    assert [path.name for path in paths] == [
        "answers.parquet",
        "compare.parquet",
        "compare.csv",
        "compare.json",
    ]
    pd.testing.assert_frame_equal(pd.read_parquet(paths[1]), found.summary())
    assert len(pd.read_csv(paths[2])) == 9
    whole = json.loads(paths[3].read_text())
    assert whole["meta"]["select_split"] == "search"
    again = Policy.model_validate(whole["policies"][0]["policy"])
    assert again.hash == found.lineup.entries[0].policy.hash


# -- figure and command ---------------------------------------------------------------------


def test_figure_puts_own_methods_first_and_leaves_gaps() -> None:
    rows = [
        {"budget": 1.0, "method": "dense", "kind": "dense", "score": 0.9},
        {"budget": 0.1, "method": "low", "kind": "baseline", "score": 0.3},
        {"budget": 0.2, "method": "low", "kind": "baseline", "score": 0.5},
        {"budget": 0.2, "method": "late", "kind": "baseline", "score": 0.7, "strongest": True},
        {"budget": 0.1, "method": "tuned", "kind": "tuned", "score": 0.2},
    ]
    frame = pd.DataFrame(
        [
            {"strongest": False, "low": r["score"] - 0.1, "high": r["score"] + 0.1, "samples": 9} | r
            for r in rows
        ]
    )
    info = budgets_info(frame)
    assert info.budgets == (0.1, 0.2)
    assert [line.method for line in info.lines] == ["tuned", "late", "low"]
    late = info.lines[1]
    assert math.isnan(late.score[0])
    assert late.score[1] == 0.7
    assert late.strongest == (False, True)
    assert info.dense == (0.9, 0.8, 1.0)
    labels = [text.get_text() for text in quality_by_budget(info).legends[0].get_texts()]
    assert labels == ["dense", "tuned", "late", "low"]
    with pytest.raises(UserError, match="needs the column 'strongest'"):
        budgets_info(frame.drop(columns="strongest"))


@pytest.mark.full  # a comparison by the command
def test_command_writes_a_table_a_figure_and_what_was_left_out(tmp_path: Path) -> None:
    mine = save_policy(Policy(name="mine", vision_keep=0.5), tmp_path / "mine.yaml")
    args = [
        *("--budget", "0.05,0.5", "--policy", str(mine), "--baseline", "uniform", "--baseline", "random"),
        *("--task", "shapes:count", "-n", "2", "--max-new-tokens", "3", "--out", str(tmp_path / "out")),
        *("--submit", str(tmp_path / "shared"), "--by", "Ada"),
    ]
    done = CliRunner().invoke(app, args, catch_exceptions=False)
    assert done.exit_code == 0
    assert "random x3" in done.stdout
    assert "left out at 0.05: uniform (budget 0.05 is below" in done.stderr
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert set(table["method"]) == {"dense", "uniform", "random", "mine"}
    (path,) = (tmp_path / "shared").iterdir()  # nothing but dense fits the other budget
    sent = read_submission(path)
    assert (sent.budget, sent.by, sent.model.name, sent.task.samples) == (0.5, "Ada", "tiny", 2)
    assert {result.method for result in sent.results} == set(table["method"])
    listed = CliRunner().invoke(app, [*args, "--format", "json"], catch_exceptions=False)
    assert {row["method"] for row in json.loads(listed.stdout)} == set(table["method"])


@pytest.mark.parametrize("budget", ["x", "0", "0.2,1.5", ""])
def test_command_refuses_a_budget_that_is_none(budget: str) -> None:
    with pytest.raises(UserError, match="budget must be shares in"):
        CliRunner().invoke(app, ["--budget", budget], catch_exceptions=False)


def test_shipped_baselines_can_be_lined_up() -> None:
    """Every baseline is either compared or left out with a reason, whatever the runtime can run."""
    policies = [find_policy(name) for name in BASELINES]
    found = line_up((0.3, 0.6), [PromptShape(4, 49, 8)], 6, baselines=policies)
    assert isinstance(found, LineUp)
    assert len(found.entries) + len(found.left_out) == 2 * len(policies)
    assert {"uniform", "random", "streaming-llm"} <= {e.method for e in found.entries}
    assert all(isinstance(item, LeftOut) and item.reason for item in found.left_out)
