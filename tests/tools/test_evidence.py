"""The evidence: what its words say follows from intervals, and its loop runs, resumes and says what lacks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import avlprof
from avlprof.evaluation import paired_difference
from tests.helpers import ROOT
from tools.evidence.__main__ import main
from tools.evidence.measure import COLUMNS, strongest
from tools.evidence.page import assembled, former_parts, write_page
from tools.evidence.plan import PLANS, plans
from tools.evidence.words import shown, told


def table(kls):
    """Rows of the samples of the search: two samples a method, `name: (kind, first, second)`."""
    rows = [
        (name, kind, "search", str(sample), kl, 1.0, 0.2, name)
        for name, (kind, *values) in kls.items()
        for sample, kl in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_the_strongest_rival_is_no_tuned_policy_and_not_picked_on_held_out_samples():
    known = table({"tuned": ("tuned", 0.0, 0.0), "a": ("rival", 0.3, 0.5), "b": ("shipped", 0.1, 0.6)})
    seen = table({"a": ("rival", 0.0, 0.0)}).assign(split="held-out")
    assert strongest(pd.concat([known, seen])) == "b"


@pytest.mark.parametrize(("shift", "word"), [(0.5, "better"), (-0.5, "worse"), (0.0, "same")])
def test_a_word_needs_an_interval_that_leaves_out_0(shift, word):
    noise = np.random.default_rng(0).normal(0, 0.1, 40)
    noise -= noise.mean()
    assert shown(paired_difference(noise + shift, np.zeros(40))) == word


def test_sentences_name_budgets():
    texts = {"better": "wins", "worse": "loses", "same": "ties"}
    assert (
        told("tuned", {0.1: "better", 0.2: "same", 0.4: "same"}, texts)
        == "tuned wins at 10%, ties at 20% and 40%"
    )
    assert told("tuned", {0.1: "worse"}, texts) == "tuned loses at 10%"


def test_plans_take_sizes_and_other_models():
    small, other = plans(["small", "mine=shapes:read"], {"trials": 3, "held_out": None})
    assert (small.trials, small.held_out) == (3, PLANS["small"].held_out)
    assert (other.model, other.task, other.trials) == ("mine", "shapes:read", 3)
    with pytest.raises(avlprof.UserError, match="mine=TASK"):
        plans(["mine"], {})


def test_a_page_keeps_what_it_says_of_other_models(tmp_path):
    """The shipped page comes apart into its models, and is the same put together or written again."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    parts = former_parts(page)
    assert {"tiny", "small"} <= set(parts)
    assert assembled(list(parts.values())) == page
    assert all(len(part.short) == 4 and len(part.command) == len(part.plan) == 1 for part in parts.values())
    copy = tmp_path / "docs" / "evidence.md"
    copy.parent.mkdir()
    copy.write_text(page, encoding="utf-8")
    write_page([], [0.1], copy)
    assert copy.read_text(encoding="utf-8") == page
    without = assembled([part for name, part in parts.items() if name != "small"])
    assert "`small`" not in without.replace("tiny and small", "") and "## The model `tiny`" in without


@pytest.mark.slow  # traces, tunes and compares: three quarters of a minute at the smallest size
def test_the_whole_loop_runs_once_and_says_what_is_missing(tmp_path):
    out, page = tmp_path / "evidence", tmp_path / "docs" / "evidence.md"
    sizes = {"traced": 2, "heads": 1, "samples": 3, "generated": 2, "held-out": 2, "trials": 3, "refine": 1}
    sized = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    words = ["--models", "tiny", "--out", str(out), "--page", str(page), *sized, "--finalists", "1"]
    main([*words, "--shares", "0.3"])
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    first = page.read_text(encoding="utf-8")
    assert "| `tiny` | 30% |" in first and "Not finished" not in first
    assert "no interval here means anything" in first
    for figure in ("layers", "budgets"):
        assert f"images/evidence-tiny-{figure}.png" in first
        assert (page.parent / "images" / f"evidence-tiny-{figure}.png").stat().st_size > 10_000
    main([*words, "--shares", "0.3"])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert page.read_text(encoding="utf-8") == first
    main([*words, "--shares", "0.3,0.5", "--steps", "page"])
    assert "**Not finished:** not searched at 50%" in page.read_text(encoding="utf-8")
