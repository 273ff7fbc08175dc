"""Parameter importances: shares of a variance that is known, how sure they are, where they are shown."""

from __future__ import annotations

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

from avlprof import plots
from avlprof.errors import UserError
from avlprof.tuning.importance import (
    FILE,
    importance_rows,
    noted_importances,
    parameter_importances,
)

X, KIND = FloatDistribution(0.0, 1.0), CategoricalDistribution(("a", "b", "c"))


def study(count, score, draw=lambda rng: rng.uniform(), seed=0, complete=lambda number: True):
    """Trials of `x`, `kind`, `other` and, with kind `c` alone, `deep`; `draw` gives the kind's place."""
    rng = np.random.default_rng(seed)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = optuna.create_study()
    for number in range(count):
        kind = KIND.choices[int(3 * draw(rng))]
        params = {"x": rng.uniform(), "kind": kind, "other": rng.uniform()}
        known = {"x": X, "kind": KIND, "other": X}
        if kind == "c":
            params["deep"], known["deep"] = rng.uniform(), X
        attributes = {"complete": complete(number)}
        made.add_trial(
            create_trial(value=score(params), params=params, distributions=known, user_attrs=attributes)
        )
    return made


def scored(params):
    """Of the variance, `x` gives 1/12 and `kind` 2/9: 27% and 73%."""
    return params["x"] + (params["kind"] == "a")


@pytest.mark.full
def test_shares_are_those_of_a_variance_that_is_known():
    table = parameter_importances(study(60, scored)).set_index("parameter")
    assert list(table.index) == ["kind", "x", "other"]
    assert table["importance"].sum() == pytest.approx(1.0)
    assert table.loc["kind", "importance"] == pytest.approx(0.73, abs=0.08)
    assert table.loc["other", "importance"] < 0.05
    assert ((table["low"] <= table["importance"]) & (table["importance"] <= table["high"])).all()
    assert table.loc["x", "importance"] == pytest.approx(0.27, abs=0.08)
    assert (table["trials"] == 60).all()


@pytest.mark.full  # forests of trials
def test_a_parameter_that_the_sampler_settled_counts_in_full():
    """Nine of ten trials have the good kind; over the whole space it decides all the same."""
    settled = study(60, lambda p: scored(p) if p["kind"] == "a" else 0.1 * p["x"], lambda rng: rng.beta(2, 1))
    table = parameter_importances(settled).set_index("parameter")
    assert table.index[0] == "kind"
    assert table.loc["kind", "importance"] > 0.6


@pytest.mark.slow  # forests of 100 trials and more
def test_few_trials_are_less_sure_than_many():
    wide, narrow = (parameter_importances(study(count, scored)).set_index("parameter") for count in (20, 80))
    spread = [table.loc["x", "high"] - table.loc["x", "low"] for table in (wide, narrow)]
    assert spread[0] > 1.5 * spread[1]


def test_too_few_or_equal_trials_have_no_importances():
    assert parameter_importances(study(19, scored)).empty
    assert not parameter_importances(study(20, scored)).empty
    assert parameter_importances(study(40, lambda p: 1.0)).empty


@pytest.mark.full  # forests of trials
def test_what_the_proof_noted_is_shown_until_trials_come(tmp_path):
    made = study(20, scored)
    noted = parameter_importances(made)
    noted["importance"] = [0.5, 0.3, 0.2]
    noted.to_csv(tmp_path / FILE, index=False)
    assert noted_importances(tmp_path, made)["importance"].tolist() == [0.5, 0.3, 0.2]
    assert [row["importance"] for row in importance_rows(tmp_path, made)] == ["50.0%", "30.0%", "20.0%"]
    made.add_trial(made.trials[0])
    assert noted_importances(tmp_path, made)["importance"].tolist() != [0.5, 0.3, 0.2]
    noted.iloc[:0].to_csv(tmp_path / FILE, index=False)
    assert importance_rows(tmp_path, study(3, scored)) == []


def test_the_figure_has_the_largest_first_and_says_how_sure():
    frame = pd.DataFrame(
        {
            "parameter": ["mix", "refresh_interval", "floor"],
            "importance": [0.195, 0.8, 0.005],
            "low": [0.1, 0.7, 0.0],
            "high": [0.3, 0.85, 0.04],
            "trials": [34, 34, 34],
        }
    )
    info = plots.parameter_importances_info(frame)
    assert info.parameters == ("refresh interval", "mix", "floor")
    assert info.importance.tolist() == [0.8, 0.195, 0.005]
    assert info.trials == 34
    figure = plots.parameter_importances(info, "KL to dense (nat per token)")
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.8, 0.195, 0.005]
    assert [text.get_text() for text in axes.texts] == ["80%", "20%", "< 1%"]
    assert "34 scalar trials" in figure.get_supxlabel()
    assert "KL to dense" in axes.get_xlabel()
    with pytest.raises(UserError, match="parameter importances"):
        plots.parameter_importances_info(frame.drop(columns="high"))
