"""Methods with smaller pictures at equal bytes: what they hold, what is found again, who takes part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from avlprof.budgets import OverBudgetError, scale_to
from avlprof.errors import UserError
from avlprof.evaluation import AnswerSettings, AnswerStore, ComparisonSettings, generate_answers, line_up
from avlprof.evaluation.compare import compare
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.evaluation.lineup import SMALLER
from avlprof.models import load_model
from avlprof.models.smaller import SamplePictures
from avlprof.policy import PicturePolicy, Policy, PromptShape, live_share, packed_share, smaller_grid
from avlprof.tasks import load_task
from avlprof.tuning.candidate import Budget
from avlprof.tuning.rivals import smaller_rivals

POOLED, POOLED4, RESIZED, _ = SMALLER
SETTINGS = AnswerSettings(2, 4)


@pytest.fixture(scope="module")
def samples():
    return load_task("shapes").samples("search", 4)


def shapes_of(loaded, samples) -> list[PromptShape]:
    answers = generate_answers(loaded, samples, None, SETTINGS)
    shapes = [PromptShape(a.system, a.vision, a.text, None, loaded.adapter.group) for a in answers]
    return SamplePictures(loaded.adapter, samples).on(shapes)


@pytest.mark.parametrize("method", [POOLED, POOLED4], ids=lambda method: method.name)
def test_a_fitted_method_holds_what_is_counted_and_no_more_than_the_budget(method, tiny, samples) -> None:
    prompts = shapes_of(tiny, samples)
    for budget in (0.08, 0.28):
        found = scale_to(method, budget, prompts, tiny.adapter.layers)
        assert live_share(found, prompts, tiny.adapter.layers) <= budget
        answers = generate_answers(tiny, samples, found, SETTINGS)
        live, dense = (sum(getattr(a, name) for a in answers) for name in ("live_bytes", "dense_bytes"))
        # by hand: all pictures have 14 x 14 tokens, and all layers hold the same
        vision = math.prod(smaller_grid(14, 14, found.pictures.share))
        share = packed_share(method.bits(1)[0], tiny.adapter.group)
        whole = sum(prompt.total for prompt in prompts)
        part = packed_share(method.text.bits, tiny.adapter.group)
        held = sum((prompt.system + prompt.text) * part + vision * share for prompt in prompts)
        assert live / dense == pytest.approx(held / whole, rel=1e-3)
        assert sum(a.vision for a in answers) == vision * len(answers)
        assert {a.policy_hash for a in answers} == {found.hash}
        grids = (math.prod(smaller_grid(14, 14, n / 196)) for n in range(1, 197))
        following = min(tokens for tokens in grids if tokens > vision)  # the next finer grid is too much
        finer = sum((prompt.system + prompt.text) * part + following * share for prompt in prompts)
        assert finer / whole > budget


def test_answers_are_found_again_and_never_for_others(tiny, samples, tmp_path: Path, monkeypatch) -> None:
    store = AnswerStore(tmp_path)
    half, third = (
        Policy(name="pooled", pictures=PicturePolicy(kind="pooled", share=share)) for share in (0.5, 0.3)
    )
    other = Policy(pictures=PicturePolicy(kind="resized", share=0.5))
    assert len({half.hash, third.hash, Policy().hash, other.hash}) == 4
    assert Policy(pictures=PicturePolicy(kind="pooled")).hash == Policy().hash
    first = generate_answers(tiny, samples, half, SETTINGS, store=store)
    dense = generate_answers(tiny, samples, None, SETTINGS, store=store)
    assert [a.vision for a in dense] == [196] * 4
    other = generate_answers(tiny, samples, third, SETTINGS, store=store)
    assert {a.vision for a in first} != {a.vision for a in other}
    assert [a.dense_bytes for a in first] == [a.dense_bytes for a in dense]
    monkeypatch.setattr(tiny.model, "generate", lambda *_, **__: pytest.fail("generated again"))
    again = AnswerStore(tmp_path)
    assert generate_answers(tiny, samples, half, SETTINGS, store=again) == first
    assert generate_answers(tiny, samples, None, SETTINGS, store=again) == dense


def test_who_cannot_take_part_is_listed(tiny, samples) -> None:
    prompts, pictures = shapes_of(tiny, samples), SamplePictures(tiny.adapter, samples)
    found = line_up((0.01, 0.2, 0.6), prompts, 6, baselines=SMALLER, pictures=pictures)
    assert [(e.method, e.budget) for e in found.entries] == [
        ("pooled", 0.2), ("pooled-4", 0.2), ("pooled", 0.6)
    ]  # fmt: skip
    reasons = {(item.method, item.budget): item for item in found.left_out}
    assert "whatever its size" in reasons["smaller-picture", 0.2].reason
    assert "all vision tokens fit" in reasons["pooled-4", 0.6].reason
    one = sum(p.system + 1 + p.text for p in prompts) / sum(p.total for p in prompts)
    assert reasons["pooled", 0.01].floor == pytest.approx(one)
    with pytest.raises(OverBudgetError, match="the least that policy 'pooled' can hold"):
        scale_to(POOLED, 0.01, prompts, 6)
    with pytest.raises(UserError, match="two policies are named 'pooled'"):
        line_up((0.2,), prompts, 6, baselines=[POOLED], given=[Policy(name="pooled")], pictures=pictures)


def test_rivals_have_the_winners_bits_and_no_more_than_may_be_read(tiny, samples) -> None:
    prompts, pictures = tuple(shapes_of(tiny, samples)), SamplePictures(tiny.adapter, samples)
    winner = Policy(name="tuned", vision_keep=0.5, vision_bits=(4, 4, 3, 3, 8, 16))
    (rival,), left_out = smaller_rivals(winner, Budget(0.4, None, prompts, 4), pictures)
    assert rival.vision_bits == winner.vision_bits
    assert list(left_out) == ["smaller-picture"]
    cored = Policy(name="tuned", vision_keep=0.5, vision_compute=0.2)
    (rival,), _ = smaller_rivals(cored, Budget(0.5, 0.3, prompts, 4), pictures)
    flat = Policy(vision_keep=0.2)
    assert live_share(rival, prompts, 6) <= sum(
        p.system + p.text + math.floor(0.2 * p.vision) for p in prompts
    ) / sum(p.total for p in prompts)
    assert flat.keep(1) == (0.2,)


@pytest.mark.full
def test_a_comparison_and_an_evaluation_have_rows_of_both_kinds(tmp_path: Path) -> None:
    loaded = load_model("tiny-mrope", device="cpu")
    task = load_task("shapes-sizes", max_new_tokens=2)
    settings = ComparisonSettings(baselines=[POOLED, RESIZED], samples=2, batch_size=2)
    found = compare(loaded, task, (0.4,), settings=settings)
    rows = found.summary().set_index("method")
    assert set(rows.index) == {"dense", "pooled", "smaller-picture"}
    assert rows["live_share"].drop("dense").between(0.33, 0.4).all()
    assert found.strongest[0.4] in ("pooled", "smaller-picture")
    found.save(tmp_path)
    assert '"kind": "resized"' in (tmp_path / "compare.json").read_text()

    policies = [Policy(name="half", vision_keep=0.5), *(entry.policy for entry in found.lineup.entries)]
    table = evaluate(loaded, task, policies, EvaluationSettings(samples=2, latency=False)).summary()
    table = table.set_index("policy")
    assert (table["kl"].drop("dense") > 0).all()
