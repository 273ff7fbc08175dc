"""Numbers that are not finite stop a verb in a sentence; they never pass for "no vision"."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import avlprof
from avlprof.analysis import Profile
from avlprof.analysis.sentences import findings
from avlprof.errors import UserError
from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.models.finite import FiniteLogits
from avlprof.policy import Policy
from avlprof.runs import RunDirectory
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_task
from avlprof.tracing import RecordOptions, record, trace_samples
from avlprof.tracing.options import TraceSettings
from tests.helpers import few

HALF = Policy(name="half", vision_keep=0.5)


@pytest.fixture(scope="module")
def task():
    return load_task("shapes:describe")


@pytest.fixture
def overflowing(tiny_copy):
    """The embedded model, which overflows behind layer 3."""
    layers = tiny_copy.model.get_decoder().layers
    layers[3].mlp.down_proj.weight.data[:] = float("inf")
    return tiny_copy


def verbs(loaded, samples, task, out):
    return {
        "trace": lambda: trace_samples(loaded, task, samples, out, TraceSettings(max_new_tokens=3)),
        "trace a batch": lambda: trace_samples(
            loaded, task, samples, out, TraceSettings(max_new_tokens=3, batch_size=2)
        ),
        "trace references": lambda: trace_samples(
            loaded, task, samples, out, TraceSettings(max_new_tokens=3, forced=True)
        ),
        "evaluate": lambda: generate_answers(loaded, samples, None, AnswerSettings(3, 2)),
        "evaluate a policy": lambda: generate_answers(loaded, samples, HALF, AnswerSettings(3, 1)),
        "forced": lambda: ForcedSet.prepare(loaded, samples, max_new_tokens=3),
        "forced references": lambda: ForcedSet.prepare(
            loaded, samples, max_new_tokens=3, answers="reference"
        ).score(HALF),
    }


@pytest.mark.parametrize("verb", few(verbs(None, None, None, None), 3))
def test_every_verb_stops(overflowing, task, tmp_path, verb):
    samples = task.samples("search", 2)
    with pytest.raises(UserError, match="layer 3 on") as error:
        verbs(overflowing, samples, task, tmp_path / "run")[verb]()
    said = str(error.value)
    assert f"sample '{samples[0].id}'" in said and "try dtype bfloat16 or float32" in said
    if "trace" in verb:
        assert not list((tmp_path / "run").glob("samples-*"))


def test_the_first_step_and_sample_that_broke_are_named():
    looking = FiniteLogits()
    sound = torch.tensor([[0.0, float("-inf")], [1.0, 2.0]])
    for value in (0.0, float("nan")):
        assert torch.equal(looking(None, sound + value), sound + value) or value != 0.0
    with pytest.raises(UserError, match=r"logits of sample 'a', at token 2 of the answer, are not finite"):
        looking.check(None, {}, ["a", "b"])


@pytest.mark.parametrize("row", [[float("nan"), 0.0], [float("inf"), 0.0], [float("-inf")] * 2])
def test_what_is_not_finite(row, tiny):
    looking = FiniteLogits()
    looking(None, torch.tensor([[0.0, 1.0], row]))
    with pytest.raises(UserError, match="sample 'b' are not finite"):
        looking.check(tiny.model, {}, ["a", "b"])


def test_tokens_that_are_ruled_out_are_no_fault():
    looking = FiniteLogits()
    looking(None, torch.tensor([[0.0, float("-inf")]]))
    looking.check(None, {}, ["a"])


@pytest.mark.parametrize("options", [RecordOptions(), RecordOptions(per_head=True, rows="all")])
def test_a_record_of_ones_own_says_it(overflowing, task, options):
    batch = overflowing.adapter.encode_samples(task.samples("search", 1))
    with record(overflowing.model, options) as recorder, torch.no_grad():
        overflowing.model(**batch)
    (row,) = recorder.records
    for table in (row.frame, row.scores):
        with pytest.raises(UserError, match="layer 4 are not finite"):
            table()


def test_one_head_of_one_layer_is_enough(tiny_copy, task, tmp_path):
    """Its queries overflow, which its output does not show: weights are one or nothing."""
    layer = tiny_copy.model.get_decoder().layers[-1].self_attn
    layer.q_proj.weight.data[0, :] = float("nan")
    layer.o_proj.weight.data[:] = 0.0
    with pytest.raises(UserError):
        trace_samples(tiny_copy, task, task.samples("search", 1), tmp_path, TraceSettings(max_new_tokens=2))


def broken_run(folder, count, of=4):
    """A traced run in which the attention of `count` samples is not finite from layer 4 on."""
    samples = load_task("shapes:describe").samples("search", of)
    run = trace_samples(
        avlprof.load_model("tiny"), load_task("shapes:describe"), samples, folder,
        TraceSettings(max_new_tokens=3, batch_size=of),
    )  # fmt: skip
    for path in folder.glob("stats-*.parquet"):
        stats = pd.read_parquet(path)
        hit = stats["sample"].isin(run.ids()[:count]) & (stats["layer"] >= 4)
        stats.loc[hit, [name for name in stats if name.startswith(("mass_", "entropy"))]] = np.nan
        stats.to_parquet(path, index=False)
    return RunDirectory(folder)


def test_a_run_of_an_earlier_version_is_counted(tmp_path):
    profile = broken_run(tmp_path, 1).path
    profile = Profile.of(RunDirectory(profile))
    assert (profile.meta.samples, profile.meta.not_finite) == (3, 1)
    assert any("3 of 4 samples" in sentence for sentence in findings(profile))
    assert profile.derive(budget=0.4).layers in (None, 6)


def test_a_run_without_a_finite_sample_is_refused(tmp_path):
    run = broken_run(tmp_path, 2, of=2)
    with pytest.raises(UserError, match="none of the 2 samples"):
        Profile.of(run)


def test_a_profile_of_0_1_0_is_made_anew(tmp_path):
    old = Path(__file__).parents[1] / "data" / "0.1.0" / "run"
    shutil.copytree(old, tmp_path / "run")
    profile = Profile.of(RunDirectory(tmp_path / "run"))
    assert profile.meta.not_finite == 0
    stored = tmp_path / "run" / "profile" / "meta.json"
    stored.write_text(profile.meta.model_copy(update={"samples": 99, "not_finite": None}).model_dump_json())
    assert Profile.of(RunDirectory(tmp_path / "run")).meta.samples < 99
