"""A sweep whose smallest safe budget is certified on samples that nothing before has seen."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import avlprof
from avlprof.api.tune import certified
from avlprof.errors import UserError
from avlprof.evaluation import AnswerSettings
from avlprof.evaluation.certificate import BudgetTest, Certificate, Claim, certify
from avlprof.policy import Policy, load_policy, save_policy
from avlprof.tasks import load_task
from avlprof.tracing import TraceSettings
from avlprof.tuning import Settings
from avlprof.tuning.certify import FILE, Certified, fresh_samples
from avlprof.tuning.prepared import Generated, answer_store
from avlprof.tuning.sweep import Sweep
from tests.cli_runner import invoke, refused
from tests.watching import Notes

TASK, LIMIT, PROOF = "shapes:row", 8, 4
SETTINGS = Settings(trials=3, refine=0, samples=4, proof_samples=PROOF, max_new_tokens=LIMIT)


@pytest.mark.full  # two studies
def test_the_tests_are_made_on_samples_behind_those_of_the_proof(tiny, tmp_path):
    run = avlprof.trace(tiny, TASK, 3, TraceSettings(max_new_tokens=LIMIT), out=tmp_path / "run")
    claim, watch = Claim(0.6, 0.9, (0.2, 0.6), samples=12), Notes()
    result = certified(tiny, TASK, claim, SETTINGS, run=run, out=tmp_path / "study", watch=watch)
    task = load_task(TASK)
    fresh = task.samples("held-out", PROOF + 12)[PROOF:]
    seen = {sample.id for sample in task.samples("held-out", PROOF)} | set(
        sample.id for sample in task.samples("search", 4)
    )
    assert not seen & {sample.id for sample in fresh}
    settings = AnswerSettings(LIMIT, 32, task.metric, {sample.id: 1 for sample in fresh})
    answers = Generated(tiny, fresh, settings, answer_store(tmp_path / "other"))
    dense = answers.metric(None)
    for study, test in zip(reversed(result.sweep.studies), result.certificate.tests, strict=False):
        assert test.budget == study.policy.provenance.budget
        assert test.samples == 12
        assert test.mean == pytest.approx(float((dense - answers.metric(study.policy)).mean()))
    record = json.loads((tmp_path / "study" / FILE).read_text())
    assert record["budget"] == result.certificate.budget == 0.2
    assert record["sentence"] == result.certificate.sentence()
    assert load_policy(tmp_path / "study" / "policy.yaml").hash == result.policy.hash
    assert watch.counts("certificate")[-1] == (3, 3)
    again = certified(tiny, TASK, claim, SETTINGS, run=run, out=tmp_path / "study")
    assert again.certificate == result.certificate


def test_samples_that_are_missing_are_named():
    task = replace(load_task(TASK), stream=lambda split: iter(load_task(TASK).samples(split, 10)), head=None)
    assert len(fresh_samples(task, replace(SETTINGS, proof_samples=6), 9)) == 4
    with pytest.raises(UserError, match="no samples behind the 10 of the proof"):
        fresh_samples(task, replace(SETTINGS, proof_samples=10), 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--confidence", "0.9"), "give --max-drop"),
        (("--confidence", "0.9", "--max-drop", "0.1", "--budget", "0.2"), "no --budget"),
        (("--max-drop", "0.1", "--budgets", "0.1,0.2"), "give one of"),
        (("--confidence", "2", "--max-drop", "0.1"), "confidence must be above 0"),
        (("--confidence", "0.9", "--max-drop", "0"), "must be above 0"),
        (("--confidence", "0.9", "--max-drop", "0.1", "--certify-samples", "0"), "must be 1 or more"),
        (("--max-drop", "0.1", "--certify-samples", "9"), "--certify-samples are those of a certificate"),
        (
            ("--confidence", "0.9", "--max-drop", "0.1", "--budgets", "0.1,0.10"),
            "must differ from each other",
        ),
        (("--max-drop", "nan"), "--max-drop must be in [0, 1)"),
        (("--max-drop", "2", "--out", "new"), "--max-drop must be in [0, 1)"),
        (("--max-drop", "0.1", "--read-budget", "0.1"), "leave the read budget out"),
    ],
)
def test_command_lines_that_certify_nothing(words, message, tmp_path, monkeypatch):
    """Each before a model is loaded or anything written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("avlprof.api.tune._plan", lambda *given: pytest.fail("work was begun"))
    assert message in refused(invoke("tune", *words))
    assert not list(tmp_path.iterdir())


def test_budgets_of_a_claim_differ():
    with pytest.raises(UserError, match=r"budgets of a certificate must differ, got 0\.1, 0\.1"):
        Claim(budgets=(0.1, 0.1))


def test_a_policy_of_an_earlier_claim_does_not_stay_beside_tests_that_failed(tmp_path):
    save_policy(Policy(vision_keep=0.2), tmp_path / "policy.yaml")
    failed = Certificate(0.01, 0.95, (BudgetTest(0.4, 0.1, 0.7, 50),))
    result = Certified(Sweep(tmp_path, []), failed)
    assert result.policy is None
    assert json.loads(result.write().read_text())["budget"] is None
    assert not (tmp_path / "policy.yaml").exists()


@pytest.mark.slow  # four thousand answers of the embedded model
def test_a_thousand_re_splits_of_the_embedded_task(tiny, tmp_path):
    """Of all certificates on a part of 1,000 samples, those that the whole contradicts are one in twenty."""
    samples = load_task(TASK).samples("held-out", 1000)
    settings = AnswerSettings(24, 32, load_task(TASK).metric, {sample.id: 1 for sample in samples})
    answers = Generated(tiny, samples, settings, answer_store(tmp_path))
    dense = answers.metric(None)
    table = {b: dense - answers.metric(avlprof.policy.Policy(vision_keep=b)) for b in (0.3, 0.5, 0.7, 0.9)}
    truth, rng = {budget: float(drops.mean()) for budget, drops in table.items()}, np.random.default_rng(0)
    for drop in sorted({round(mean * scale, 4) for mean in truth.values() for scale in (0.7, 0.95)}):
        if drop <= 0.0:
            continue
        wrong = 0
        for _ in range(1000):
            rows = rng.integers(0, 1000, 300)
            budget = certify(Claim(drop, 0.95, tuple(table)), lambda b, rows=rows: table[b][rows]).budget
            wrong += budget is not None and truth[budget] > drop
        assert wrong <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95), (drop, truth, wrong)
