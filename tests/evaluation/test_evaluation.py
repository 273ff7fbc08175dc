"""Evaluation: its statistics against brute force, its answers and bytes against the model itself."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

import avlprof
from avlprof.attention.session import cache_of
from avlprof.cli.evaluate import app
from avlprof.errors import UserError
from avlprof.evaluation import (
    AnswerSettings,
    AnswerStore,
    detectable_drop,
    equal_bytes,
    generate_answers,
    mean_interval,
    measure_latency,
    paired_difference,
)
from avlprof.evaluation.answers import EncodedBatches, answer_batches
from avlprof.evaluation.evaluate import COLUMNS, Evaluation, EvaluationSettings, evaluate
from avlprof.evaluation.lineup import policy_rows, with_baselines
from avlprof.models import Adapter
from avlprof.models.answers import answer_length
from avlprof.policy import (
    DENSE,
    RANKING,
    JointPool,
    Policy,
    PromptShape,
    ScorerSpec,
    TextPolicy,
    live_share,
    read_share,
    sizes,
)
from avlprof.tasks import load_task
from tests.helpers import few
from tests.watching import Counted

LAYERED = Policy(
    name="layered", vision_keep=(0.6, 0.3, 0.2, 0.1, 0.4, 0.2), vision_compute=0.1, refresh_interval=4
)
WINDOWED = Policy(name="windowed", vision_keep=0.4, text=TextPolicy(window=6, sink=1))
BITS = LAYERED.model_copy(update={"name": "bits", "vision_bits": (4, 2, 3, 8, 16, 4)})
LIMIT = 12


@pytest.fixture(scope="module")
def samples():
    return load_task("shapes:describe,count,where").samples("held-out", 5)


# --- intervals ---


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        found = mean_interval(random.normal(3.0, 2.0, 40), seed=trial, resamples=500)
        covered += found.low <= 3.0 <= found.high
    assert 0.89 <= covered / 300 <= 0.98


def test_interval_is_close_to_the_t_interval_and_repeatable():
    values = np.random.default_rng(1).normal(size=400)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found == mean_interval(values)
    assert found != mean_interval(values, seed=1)


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0, 1.0]])
def test_interval_without_spread_has_no_width(values):
    found = mean_interval(values)
    assert found.low == found.mean == found.high == values[0]
    assert found.samples == len(values)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_interval_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_p_value_counts_sign_patterns(n):
    random = np.random.default_rng(n)
    a, b = random.integers(0, 3, n) / 2, random.integers(0, 3, n) / 2
    differences = a - b
    means = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=n)]
    wanted = np.mean([abs(mean) >= abs(differences.sum()) - 1e-9 for mean in means])
    assert paired_difference(a, b).p_value == pytest.approx(wanted)


def test_p_value_of_many_samples_agrees_with_wilcoxon_and_t():
    random = np.random.default_rng(4)
    b = random.normal(size=60)
    a = b + random.normal(0.25, 1.0, 60)
    found = paired_difference(a, b)
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert found.p_value == pytest.approx(stats.wilcoxon(a, b).pvalue, abs=0.06)
    assert found.difference.mean == pytest.approx((a - b).mean())
    assert found.sd == pytest.approx((a - b).std(ddof=1))
    assert paired_difference(b, a).difference.mean == pytest.approx(-found.difference.mean)


def test_p_value_of_equal_scores_is_one_and_of_noise_is_spread_evenly():
    assert paired_difference([0, 1, 1], [0, 1, 1]).p_value == 1.0
    random = np.random.default_rng(5)
    found = [paired_difference(random.normal(size=20), np.zeros(20), seed=i).p_value for i in range(150)]
    assert 0.0 <= np.mean(np.array(found) < 0.05) < 0.11
    assert 0.4 < np.mean(found) < 0.6
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1.0], [1.0, 2.0])


def test_detectable_drop_is_found_four_times_out_of_five():
    n, sd = 50, 0.4
    drop = detectable_drop(n, sd)
    random = np.random.default_rng(6)
    seen = np.abs(random.normal(drop, sd, (4000, n)).mean(axis=1)) > stats.norm.ppf(0.975) * sd / math.sqrt(n)
    assert seen.mean() == pytest.approx(0.8, abs=0.02)
    assert detectable_drop(4 * n, sd) == pytest.approx(drop / 2)
    with pytest.raises(ValueError, match="n >= 1"):
        detectable_drop(0, sd)


# --- answers ---


def test_answer_ends_with_its_first_end_token():
    assert answer_length([5, 6, 2, 2, 3], (2,)) == 3
    assert answer_length([5, 6], (2, 9)) == 2
    assert answer_length([9, 2], (2, 9)) == 1
    assert answer_length([4, 4], ()) == 2


def test_answers_are_those_of_plain_generate_whatever_the_batch(tiny, samples):
    stock = generate_answers(tiny, samples, None, AnswerSettings(LIMIT, 2))
    keep_all = generate_answers(tiny, samples, DENSE, AnswerSettings(LIMIT, 3))
    for sample, a, b in zip(samples, stock, keep_all, strict=True):
        inputs = tiny.adapter.encode([sample.prompt], [sample.open_images()])
        ids = tiny.model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
        alone = ids[0, inputs["input_ids"].shape[1] :]
        assert a.prediction == b.prediction == tiny.adapter.decode(alone[None])[0]
        assert a.sample == sample.id
        assert a.generated_tokens == b.generated_tokens == len(alone)
        assert a.score == float(a.prediction.lower() == sample.answers[0].lower())
        assert a.system + a.vision + a.text == inputs["input_ids"].shape[1]


def test_answers_of_like_length_share_a_batch_and_are_encoded_once(tiny, samples, monkeypatch):
    """The longest first; a prompt that is much longer stays with its like; and what policies ask twice is
    encoded once, as far as there is room."""
    lengths = {sample.id: 200 + i for i, sample in enumerate(samples)}
    said = {sample.id: (7 * i) % 5 for i, sample in enumerate(samples)}
    batches = [*answer_batches(tiny, samples, AnswerSettings(LIMIT, 2, "exact_match", lengths, said))]
    order = [said[sample.id] for batch in batches for sample in batch]
    assert order == sorted(said.values(), reverse=True)
    lengths[samples[0].id] = 900
    batches = [*answer_batches(tiny, samples, AnswerSettings(LIMIT, 2, "exact_match", lengths, said))]
    assert batches[-1][-1] is samples[0]
    plain, encoded = Adapter.encode_samples, []
    monkeypatch.setattr(
        Adapter, "encode_samples", lambda self, some: encoded.append(len(some)) or plain(self, some)
    )
    for most, times in ((1 << 28, 1), (0, 2)):
        encoded.clear()
        settings = AnswerSettings(LIMIT, 2, "exact_match", lengths, said, EncodedBatches(most))
        found = [generate_answers(tiny, samples, policy, settings) for policy in (None, DENSE)]
        assert [a.prediction for a in found[0]] == [a.prediction for a in found[1]]
        assert sum(encoded) == times * len(samples)


@pytest.mark.parametrize("policy", few([LAYERED, BITS, WINDOWED], 2), ids=lambda policy: policy.name)
def test_live_bytes_are_those_of_sizes_and_read_bytes_those_that_the_runtime_counts(tiny, samples, policy):
    token = tiny.adapter.kv_bytes_per_token_per_layer(torch.float16)  # whatever it runs in
    answers = generate_answers(tiny, samples, policy, AnswerSettings(LIMIT, 3))
    for sample, answer in zip(samples, answers, strict=True):
        shape = PromptShape(answer.system, answer.vision, answer.text)
        kept = sum(size.live for size in sizes(policy, shape, tiny.adapter.layers))
        assert answer.live_bytes == kept * token
        assert answer.dense_bytes == shape.total * tiny.adapter.layers * token
        assert answer.live_bytes <= answer.allocated_bytes
        inputs = tiny.adapter.encode([sample.prompt], [sample.open_images()])
        with avlprof.apply(tiny.model, policy) as runtime:
            tiny.model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
        counted = sum(use.read for use in runtime.cache.use())
        assert answer.read_bytes_per_step == pytest.approx(counted)
        assert answer.policy_hash == policy.hash


def test_stock_bytes_are_the_stock_cache_itself(tiny, samples):
    answer = generate_answers(tiny, samples[:1], None, AnswerSettings(2, 1))[0]
    inputs = tiny.adapter.encode([samples[0].prompt], [samples[0].open_images()])
    with torch.inference_mode():
        cache = cache_of(tiny.model(**inputs, use_cache=True))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert answer.allocated_bytes == held
    assert cache.layers[0].keys.dtype == torch.float32
    assert answer.live_bytes == answer.dense_bytes == answer.read_bytes_per_step == held / 2


def test_finished_answers_are_not_generated_again(tiny, samples, tmp_path, monkeypatch):
    first = generate_answers(
        tiny, samples[:3], LAYERED, AnswerSettings(LIMIT, 2), store=AnswerStore(tmp_path)
    )
    asked = []
    encode = type(tiny.adapter).encode_samples

    def noted(self, samples):
        asked.extend(sample.prompt for sample in samples)
        return encode(self, samples)

    monkeypatch.setattr(type(tiny.adapter), "encode_samples", noted)
    again = generate_answers(tiny, samples, LAYERED, AnswerSettings(LIMIT, 2), store=AnswerStore(tmp_path))
    assert again[:3] == first
    assert sorted(asked) == sorted(sample.prompt for sample in samples[3:])
    asked.clear()
    generate_answers(tiny, samples[:3], LAYERED, AnswerSettings(LIMIT + 1), store=AnswerStore(tmp_path))
    generate_answers(tiny, samples[:3], None, AnswerSettings(LIMIT), store=AnswerStore(tmp_path))
    assert len(asked) == 6
    f1 = generate_answers(
        tiny, samples[:3], LAYERED, AnswerSettings(LIMIT, metric="token_f1"), store=AnswerStore(tmp_path)
    )
    assert len(asked) == 6
    assert [a.prediction for a in f1] == [a.prediction for a in first]
    assert any(a.score != b.score for a, b in zip(f1, first, strict=True))


def test_answers_survive_an_interruption(tiny, samples, tmp_path):
    class Stop(Counted):
        def phase(self, name: str, done: int, total: int) -> None:
            if done >= 2:
                raise KeyboardInterrupt

    one = AnswerSettings(2, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        generate_answers(tiny, samples, None, one, store=AnswerStore(tmp_path), watch=Stop())
    watch = Counted()
    generate_answers(tiny, samples, None, one, store=AnswerStore(tmp_path), watch=watch)
    assert watch.calls == [(done, 5) for done in (2, 3, 4, 5)]
    assert watch.phases == ["answers"]


def test_a_broken_part_is_named(tmp_path):
    (tmp_path / "part-x.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"part-x\.parquet cannot be read"):
        AnswerStore(tmp_path)


# --- who is compared ---

SHAPES = [PromptShape(3, 196, 12), PromptShape(3, 196, 20), PromptShape(3, 392, 7)]


@pytest.mark.parametrize("policy", [LAYERED, WINDOWED, Policy(vision_keep=(0.5, 0.25) * 3)])
def test_baselines_have_equal_bytes(policy):
    live, read = live_share(policy, SHAPES, 6), read_share(policy, SHAPES, 6, 20)
    found = equal_bytes(policy, SHAPES, 6, 20)
    assert [p.name for p in found] == (["random"] if policy is WINDOWED else ["uniform", "random"])
    token = 1 / sum(shape.total for shape in SHAPES)
    for baseline in found:
        assert live - token <= live_share(baseline, SHAPES, 6) <= live + 1e-12
        assert read - 2 * token <= read_share(baseline, SHAPES, 6, 20) <= read + 1e-12
        counts = {sizes(baseline, SHAPES[0], 6)[layer].vision for layer in range(6)}
        assert max(counts) - min(counts) <= 1


def test_baselines_refresh_as_the_policy_does():
    scoring = LAYERED.model_copy(update={"refresh": "score_only"})
    found = equal_bytes(scoring, SHAPES, 6, 20)
    assert {p.refresh for p in found} == {"score_only"}
    assert sum(found[0].compute(6)) > sum(equal_bytes(LAYERED, SHAPES, 6, 20)[0].compute(6)) - 1e-9
    read = read_share(scoring, SHAPES, 6, 20)
    token = 1 / sum(shape.total for shape in SHAPES)
    for baseline in found:
        assert read - 2 * token <= read_share(baseline, SHAPES, 6, 20) <= read + 1e-12


def test_baselines_that_do_what_another_row_does_are_left_out():
    uniform, random = (
        Policy(name="u", vision_keep=0.2, scorer=ScorerSpec.of(RANKING)),
        Policy(name="r", vision_keep=0.2, scorer=ScorerSpec(name="random")),
    )
    found = with_baselines(policy_rows([uniform, random]), SHAPES, 6, 20)
    assert [c.label for c in found] == ["dense", "u", "r x3"]
    assert len(with_baselines(policy_rows([LAYERED]), SHAPES, 6, 20)) == 4


def test_joint_pool_below_its_text_has_no_baselines():
    assert equal_bytes(Policy(pool="joint", joint=JointPool(keep=0.01)), SHAPES, 6, 20) == []


def test_rows_are_named_apart_and_dense_comes_once():
    twins = [
        Policy(name="a", vision_keep=0.5),
        Policy(name="a", vision_keep=0.4),
        Policy(name="b", vision_keep=0.5),
    ]
    found = policy_rows([DENSE, *twins, Policy(scorer=ScorerSpec(name="random"), vision_keep=0.1, name="r")])
    assert [c.label for c in found] == ["dense", "a", "a (2)", "r x3"]
    assert {run.scorer.options["seed"] for run in found[-1].runs} == {0, 1, 2}


# --- latency and the whole ---


def test_latencies_are_positive_and_every_policy_takes_the_same_turns(tiny, samples):
    watch = Counted()
    found = measure_latency(
        tiny, samples[:1], {"dense": None, "p": LAYERED}, new_tokens=4, repeats=2, watch=watch
    )
    assert [latency.policy for latency in found] == ["dense", "p"]
    assert all(latency.first_token_ms > 0 and latency.tokens_per_s > 0 for latency in found)
    assert all(latency.measurements == 2 for latency in found)
    assert watch.calls == [(done, 4) for done in (1, 2, 3, 4)]
    shape = tiny.adapter.encode([samples[0].prompt], [samples[0].open_images()])["input_ids"].shape[1]
    token = tiny.adapter.kv_bytes_per_token_per_layer() * tiny.adapter.layers
    assert found[0].cache_bytes == (shape + 3) * token
    with pytest.raises(UserError, match="2 or more new tokens"):
        measure_latency(tiny, samples[:1], {"dense": None}, new_tokens=1)


@pytest.fixture(scope="module")
def evaluation(tiny, tmp_path_factory):
    watch = Counted()
    task = load_task("shapes:describe,count", max_new_tokens=5)
    random = Policy(name="random", vision_keep=0.1, scorer=ScorerSpec(name="random"))
    settings = EvaluationSettings(samples=4, batch_size=2)
    found = evaluate(tiny, task, [LAYERED, random], settings, watch=watch)
    assert watch.calls[-1][0] == watch.calls[-1][1]
    assert [done for done, _ in watch.calls] == sorted(done for done, _ in watch.calls)
    assert watch.phases == ["evaluate"]
    return found


def test_summary_has_a_row_a_policy_and_dense_is_the_reference(evaluation):
    summary = evaluation.summary().set_index("policy")
    assert list(summary.index) == ["dense", "layered", "random x3"]
    assert tuple(evaluation.summary().columns) == COLUMNS
    dense = summary.loc["dense"]
    assert (dense["live_share"], dense["read_share"], dense["kl"], dense["agreement"]) == (1, 1, 0, 1)
    assert dense["difference"] == 0
    assert math.isnan(dense["p_value"])
    assert (summary["samples"] == 4).all()
    assert (summary["low"] <= summary["score"]).all()
    assert (summary["score"] <= summary["high"]).all()
    assert (summary["first_token_ms"] > 0).all()
    assert summary["kl"].between(0, 50).all()
    assert 0 < summary.loc["layered", "read_share"] < summary.loc["layered", "live_share"] < 0.5


def test_summary_follows_from_the_frame(evaluation):
    frame = evaluation.frame()
    assert len(frame) == 4 * (1 + 1 + 3)
    summary = evaluation.summary().set_index("policy")
    for label, rows in frame.groupby("policy"):
        assert summary.loc[label, "score"] == pytest.approx(rows["score"].mean())
        assert summary.loc[label, "output_tokens"] == pytest.approx(rows["generated_tokens"].mean())
        assert summary.loc[label, "live_share"] == pytest.approx(
            rows["live_bytes"].sum() / rows["dense_bytes"].sum()
        )
    assert set(evaluation.latency_frame()["policy"]) == {*summary.index, "dense (preallocated)"}
    pareto = evaluation.pareto()
    assert {"policy", "family", "score", "low", "high", "live_share", "n"} <= set(pareto.columns)
    assert evaluation.groups().loc["dense"].mean() == pytest.approx(summary.loc["dense", "score"])


def test_results_are_written(evaluation, tmp_path):
    evaluation.to_csv(tmp_path / "summary.csv")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "summary.csv"), evaluation.summary(), check_dtype=False
    )
    written = json.loads(evaluation.to_json(tmp_path / "summary.json").read_text())
    assert written["meta"]["samples"] == 4
    assert len(written["summary"]) == 3
    frame = pd.read_parquet(evaluation.to_parquet(tmp_path / "answers.parquet"))
    pd.testing.assert_frame_equal(frame, evaluation.frame())


def test_paired_difference_of_a_summary_is_by_sample():
    score = {"dense": [1.0, 1.0, 0.0, 1.0, 1.0, 1.0], "p": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]}
    rows = [
        {
            "policy": label,
            "family": label,
            "seed": 0,
            "sample": f"s{i}",
            "group": "",
            "score": value,
            "generated_tokens": 3,
            "live_bytes": 50 if label == "p" else 100,
            "dense_bytes": 100,
            "allocated_bytes": 100,
            "read_bytes_per_step": 50.0,
            "kl": math.nan,
            "agreement": math.nan,
        }
        for label, values in score.items()
        for i, value in enumerate(values)
    ]
    shuffled = pd.DataFrame(rows).sample(frac=1, random_state=0).sort_values("policy", kind="stable")
    found = Evaluation({}, shuffled).summary().set_index("policy").loc["p"]
    wanted = paired_difference(score["p"], score["dense"])
    assert found["difference"] == pytest.approx(-0.5)
    assert found["p_value"] == wanted.p_value == pytest.approx(0.25)
    assert found["detectable"] == pytest.approx(detectable_drop(6, wanted.sd))
    assert math.isnan(found["kl"])
    assert math.isnan(found["tokens_per_s"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": [Policy(vision_keep=(0.5, 0.5))]}, "written for 2 layers, the model has 6"),
        ({"split": "nope"}, "unknown split"),
        ({"batch_size": 0}, "batch_size must be 1 or more samples, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"policies": [Policy(scorer=ScorerSpec(name="nope"))]}, "unknown scorer"),
    ],
)
def test_bad_input_is_one_sentence(tiny, options, message):
    task = load_task("shapes")
    policies = options.pop("policies", [LAYERED])
    with pytest.raises(UserError, match=message):
        evaluate(tiny, task, policies, EvaluationSettings(**({"samples": 2} | options)))


@pytest.mark.full  # an evaluation by the command
def test_command_writes_its_results_and_resumes(tmp_path):
    arguments = ["--policy", "uniform", "--task", "shapes:count", "-n", "2", "--max-new-tokens", "4"]
    arguments += [
        "--no-latency",
        "--no-fidelity",
        "--no-baselines",
        "--out",
        str(tmp_path),
        "--format",
        "json",
    ]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert [row["policy"] for row in json.loads(first.stdout)] == ["dense", "uniform"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("answers.parquet", "pareto.png", "parts", "summary.csv", "summary.json")
    }
    parts = sorted((tmp_path / "parts").iterdir())
    again = CliRunner().invoke(app, arguments)
    assert again.stdout == first.stdout
    assert sorted((tmp_path / "parts").iterdir()) == parts
    assert "next: avlprof run" in again.stderr
