"""Knockouts: which cuts, what is kept and resumed, judged answers, and correlations by brute force."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import avlprof
from avlprof.cli._options import parse_layers
from avlprof.errors import UserError
from avlprof.evaluation import (
    AnswerSettings,
    Knockout,
    KnockoutSettings,
    LossStore,
    generate_answers,
    mean_interval,
)
from avlprof.evaluation import damage as damages
from avlprof.evaluation.knockout import knockout, places
from avlprof.runtime.cuts import Cut, Route, cutting
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_metric, load_task
from avlprof.tracing import TraceSettings
from tests.cli_runner import invoke, refused
from tests.watching import Counts, Notes

TASK = "shapes:count"
SETTINGS = KnockoutSettings(
    samples=3, routes=("answer-to-vision", "vision-to-question"), layers=(0, 2), batch_size=2
)


@pytest.fixture(scope="module")
def task():
    return load_task(TASK)


@pytest.fixture(scope="module")
def found(tiny, task, tmp_path_factory):
    """A knockout of two routes, around two layers, and where its losses lie."""
    folder, watch = tmp_path_factory.mktemp("losses"), Notes()
    return knockout(tiny, task, SETTINGS, store=LossStore(folder), watch=watch), folder, watch


def test_which_layers_are_closed_together():
    def spans(**options):
        return KnockoutSettings(**options).spans([0, 1, 3, 4, 5], 6)

    assert spans(layers=(0, 3)) == {0: (0,), 3: (3,), -1: (0, 1, 3, 4, 5)}
    assert spans(layers=(0, 3, 5), window=3) == {
        0: (0, 1),
        3: (3, 4),
        5: (4, 5),
        -1: (0, 1, 3, 4, 5),
    }, "around each, as far as there are layers that attend"
    assert spans(layers=(1,), window=2)[1] == (1,)
    assert spans(layers=(1, 4), window="rest") == {1: (1, 3, 4, 5), 4: (4, 5), -1: (0, 1, 3, 4, 5)}
    with pytest.raises(UserError, match="layer 2 has no attention; choose layers of 0, 1, 3, 4, 5"):
        spans(layers=(2,))
    with pytest.raises(UserError, match="layer 6 is not in 0 to 5"):
        spans(layers=(6,))
    by_head = places(KnockoutSettings(heads=True, routes=("last-to-vision",), layers=(1,)), range(2), 2, 3)
    assert [(place.layer, place.head, place.cut.heads) for place in by_head] == [
        *((1, -1, None), (-1, -1, None)),
        *((1, head, (head,)) for head in range(3)),
    ]
    assert parse_layers("8, 0-2,1") == (0, 1, 2, 8)


@pytest.mark.parametrize("text", ["", "1-", "-1", "3-1", "a", "1;2", "0-999999"])
def test_layers_that_are_none(text):
    with pytest.raises(UserError, match="0-5,8"):
        parse_layers(text)


def test_what_settings_refuse():
    for options, said in (
        ({"routes": ()}, "one or several"),
        ({"routes": ("last-to-vision",) * 2}, "each once"),
        ({"routes": ("vision",)}, "SOURCE-to-TARGET"),
        ({"window": 0}, "1 or more layers"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UserError, match=said):
            KnockoutSettings(**options)


def test_losses_are_those_of_forced_scoring_and_of_answers_said_anew(tiny, task, found):
    """Answers of which no token changes are not said again, so here all of them are."""
    losses, judge = found[0].frame(), load_metric(task.metric)
    samples = task.samples("search", 3)
    limit = AnswerSettings(task.max_new_tokens, 3, task.metric)
    dense = {answer.sample: answer for answer in generate_answers(tiny, samples, None, limit)}
    for layers, layer in (((0,), 0), ((0, 1, 2, 3, 4, 5), -1)):
        cut = Cut(Route.of("answer-to-vision"), layers)
        own = losses[(losses["route"] == "answer-to-vision") & (losses["layer"] == layer)].set_index("sample")
        scores = ForcedSet.prepare(tiny, samples, max_new_tokens=task.max_new_tokens).score_cuts([cut])[0]
        with cutting(tiny.model, cut):
            said = generate_answers(tiny, samples, None, limit)
        for sample, score, answer in zip(samples, scores, said, strict=True):
            row = own.loc[sample.id]
            assert row["kl"] == pytest.approx(score.kl, abs=1e-5)
            assert row["same"] == float(answer.prediction == dense[sample.id].prediction)
            assert row["score"] == judge(answer.prediction, sample.answers)
            assert row["dense"] == dense[sample.id].score
    assert losses.query("layer == -1")["same"].min() == 0.0, "something is lost"


def test_tables_and_what_they_cannot_show(found):
    result, _, _ = found
    summary = result.summary()
    assert list(summary.columns) == list(damages.COLUMNS)
    assert summary[["route", "layer"]].to_records(index=False).tolist() == [
        (route, layer) for route in SETTINGS.routes for layer in (0, 2, -1)
    ]
    own = result.losses.query("route == 'answer-to-vision' and layer == -1")
    row = summary.iloc[2]
    assert row["kl"] == pytest.approx(own["kl"].mean())
    assert row["difference"] == pytest.approx((own["score"] - own["dense"]).mean())
    assert row["kl_low"] <= row["kl"] <= row["kl_high"]
    assert (summary[3:]["kl"] == 0.0).all(), "no picture looks at the question behind it"
    assert any("3 samples are too few" in text for text in result.warnings())
    assert any("vision-to-question changes nothing" in text for text in result.warnings())


def test_a_second_call_measures_what_is_new(tiny, task, found, monkeypatch):
    """Another route, the heads, or answers where there were none; and nothing where all is known."""
    result, folder, watch = found
    assert watch.counts("knockout")[0] == (0, 18)
    assert watch.counts("knockout")[-1] == (18, 18)
    again = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(ForcedSet, "prepare", None)
        same = knockout(tiny, task, SETTINGS, store=LossStore(folder), watch=again)
    assert again.phases == [("knockout", 18, 18)]
    pd.testing.assert_frame_equal(same.losses, result.losses)
    more = replace(SETTINGS, routes=("answer-to-vision",), layers=(2, 4), answers=False)
    knockout(tiny, task, more, store=LossStore(folder), watch=again)
    assert again.counts("knockout")[1] == (6, 9)


@pytest.mark.full  # three knockouts
def test_an_interrupted_knockout_resumes(tiny, task, tmp_path):
    settings = replace(SETTINGS, routes=("answer-to-vision",), answers=False)

    def interrupt(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    store = LossStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        knockout(tiny, task, settings, store=store, watch=Counts(interrupt))
    watch = Notes()
    result = knockout(tiny, task, settings, store=LossStore(tmp_path), watch=watch)
    assert 4 <= watch.counts("knockout")[0][0] < 9
    pd.testing.assert_frame_equal(result.losses, knockout(tiny, task, settings).losses, atol=1e-5)


def test_damaged_parts_are_refused(tmp_path):
    (tmp_path / "part-x.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="delete it and run again"):
        LossStore(tmp_path)


def brute(damage, mass, draws):
    """Ends of the interval of Spearman's correlation over means of drawn samples."""
    rhos = [spearmanr(damage.iloc[draw].mean(), mass.iloc[draw].mean()).statistic for draw in draws]
    return np.quantile(rhos, [0.025, 0.975])


def test_intervals_of_many_cuts_are_those_of_each():
    values = np.random.default_rng(1).random((9, 4))
    values[:, 2] = 0.5
    found = np.stack(damages.intervals(values), axis=1)
    wanted = [mean_interval(column) for column in values.T]
    np.testing.assert_allclose(found, [(one.mean, one.low, one.high) for one in wanted], atol=1e-12)


def test_rank_correlations_are_their_bootstrap(monkeypatch):
    random = np.random.default_rng(4)
    names = [f"s{i}" for i in range(12)]
    layers = list(range(5))
    damage = pd.DataFrame(random.random((12, 5)) + np.arange(5) / 4, names, layers)
    mass = pd.DataFrame(random.random((12, 5)) + np.arange(5) / 3, [*names[2:], "x", "y"], layers)
    ours = damages.rank_correlation(damage, mass)
    common = names[2:]
    a, b = damage.loc[common], mass.loc[common]
    assert (ours["paired"], ours["samples"]) == (True, 10)
    assert ours["rank_correlation"] == pytest.approx(spearmanr(a.mean(), b.mean()).statistic)
    monkeypatch.setattr(damages, "RESAMPLES", 200)
    few = damages.rank_correlation(damage, mass)
    draws = np.random.default_rng(0).integers(0, 10, (200, 10))
    assert (few["low"], few["high"]) == pytest.approx(brute(a, b, draws))
    assert ours["low"] < ours["rank_correlation"] < ours["high"]
    apart = damages.rank_correlation(damage, mass.set_axis([f"t{i}" for i in range(12)]))
    assert not apart["paired"]
    assert apart["rank_correlation"] == pytest.approx(spearmanr(damage.mean(), mass.mean()).statistic)
    assert damages.rank_correlation(damage * 0.0, mass) is None


@pytest.mark.full  # a trace and a knockout
def test_attention_of_a_route_is_the_traces(tiny, task, tmp_path):
    """Shares by sample and layer are those of the run, and a window of layers has the mean of theirs."""
    run = avlprof.trace(tiny, task, 3, TraceSettings(max_new_tokens=4), out=tmp_path / "run")
    stats = run.stats()
    name, mass = damages.attention_of("answer-to-vision", run.profile())
    own = stats[stats["query"] == "generated"].groupby(["sample", "layer"])["mass_vision"].mean().unstack()
    assert name == "generated rows (decode) on vision"
    np.testing.assert_allclose(mass, own.loc[mass.index], atol=1e-6)
    assert damages.attention_of("vision-to-answer", run.profile()) is None
    settings = replace(SETTINGS, routes=("question-to-vision",), layers=None, window=2, answers=False)
    result = knockout(tiny, task, settings)
    (row,) = result.beside(run.profile()).to_dict("records")
    assert (row["layers"], row["samples"], row["paired"]) == (6, 3, True)
    kl = result.losses[result.losses["layer"] >= 0].groupby("layer")["kl"].mean()
    text = stats[stats["query"] == "text"].groupby("layer")["mass_vision"].mean()
    pairs = [text[[i, i + 1]].mean() if i < 5 else text[5] for i in range(6)]
    assert row["rank_correlation"] == pytest.approx(spearmanr(kl, pairs).statistic)
    np.testing.assert_allclose(result.attention(run.profile())["mean"], pairs, atol=1e-6)
    assert "rank correlation of" in damages.words(result.beside(run.profile()))[0]
    rest = Knockout(result.meta | {"window": "rest"}, result.losses)
    assert rest.beside(run.profile()).empty


@pytest.mark.full  # a command and its figures
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("knockout", "-t", TASK, "-n", "1", "--layers", "1", "--route", "last-to-vision", "--heads")
    done = invoke(*words, "-o", "out")
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "out" / "summary.csv")) == 8
    noted = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert noted["meta"]["routes"] == ["last-to-vision"]
    assert {"knockout.png", "heads.png", "losses.parquet"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert "of single heads" in done.stderr
    assert "8 of 8" in done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert "same answers" in done.stdout
    assert "layer 6 is not in 0 to 5" in refused(invoke(*words[:5], "--layers", "6"))
    assert "--window must be" in refused(invoke("knockout", "--window", "x"))
    assert "end of a route" in refused(invoke("knockout", "--route", "questoin-to-vision"))
