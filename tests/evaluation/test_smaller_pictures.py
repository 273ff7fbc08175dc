"""Methods with smaller pictures at equal bytes: what they hold, what is found again, who takes part."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import avlprof
from avlprof.budgets import OverBudgetError, scale_to
from avlprof.errors import UserError
from avlprof.evaluation import AnswerSettings, AnswerStore, ComparisonSettings, generate_answers, line_up
from avlprof.evaluation.compare import compare
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.evaluation.lineup import SMALLER
from avlprof.models import load_model
from avlprof.models.smaller import SamplePictures, smaller_pictures
from avlprof.policy import (
    RANKING,
    PicturePolicy,
    Policy,
    PromptShape,
    ScorerSpec,
    live_share,
    packed_share,
    save_policy,
    smaller_grid,
)
from avlprof.policy.export import export_to
from avlprof.runtime.forced import ForcedBatch, ForcedSet, SteppedBatch
from avlprof.tasks import load_task
from avlprof.tuning.candidate import Budget
from avlprof.tuning.rivals import smaller_rivals
from tests.cli_runner import invoke, refused

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


@torch.inference_mode()
def logits(model, adapter, sample, answer):
    """Log-probabilities `[T, V]` of an answer's tokens: the stock model on the prompt and the answer."""
    encoding = adapter.encode_samples([sample])
    tokens = torch.tensor([answer[:-1]])
    ids = torch.cat([encoding["input_ids"], tokens], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in encoding:
        kinds = encoding["mm_token_type_ids"]
        more["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tokens)], dim=1)
    return model(**(dict(encoding) | more)).logits[0, -len(answer) :].float().log_softmax(dim=-1)


WAYS = [
    ("tiny", "shapes", "pooled"),
    *(
        pytest.param("tiny-mrope", "shapes-sizes", kind, marks=pytest.mark.full)
        for kind in ("pooled", "resized")
    ),
]


@pytest.mark.parametrize(("name", "task", "kind"), WAYS)
def test_forced_scores_compare_with_the_dense_answers_to_whole_pictures(name, task, kind, monkeypatch):
    """All kept: the stock model's own logits. Else: the runtime, token by token, on the smaller prompts."""
    loaded, ranked = load_model(name, device="cpu", dtype="float32"), ScorerSpec.of(RANKING)
    samples = load_task(task).samples("search", 3)
    shown = PicturePolicy(kind=kind, share=0.4)
    forced = ForcedSet.prepare(loaded, samples, max_new_tokens=6, batch_size=2, scorers=[ranked])
    within = partial(smaller_pictures, loaded, shown)
    bare = [
        Policy(),
        Policy(vision_keep=0.5, scorer=ranked, vision_bits=4),
        Policy(vision_keep=0.6, vision_compute=0.2, refresh_interval=2, scorer=ranked),
    ]
    policies = [policy.model_copy(update={"pictures": shown}) for policy in bare]
    # smaller and whole ones in one call, with room for no prompt at all beside the one at work
    forced.room = replace(forced.room, device=0, host=0)
    mixed = forced.score_many([policies[0], *bare, *policies[1:]])
    found, whole = [mixed[0], *mixed[4:]], mixed[1:4]
    assert [score.kl for score in whole[0]] == pytest.approx([0.0] * 3, abs=1e-6)
    for i, (sample, answer) in enumerate(zip(samples, forced.answers, strict=True)):
        dense = logits(loaded.model, loaded.adapter, sample, answer)
        with within() as smaller:
            ours = logits(smaller.model, smaller.adapter, sample, answer)
            encoding = smaller.adapter.encode_samples([sample])
        assert len(dense) == len(answer)
        kl = (dense.exp() * (dense - ours)).sum(dim=-1).mean()
        assert kl > 1e-3
        assert found[0][i].kl == pytest.approx(float(kl), abs=1e-4, rel=1e-3)
        assert found[0][i].agreement == float((dense.argmax(-1) == ours.argmax(-1)).double().mean())
        stepped = SteppedBatch(
            loaded.model,
            encoding,
            [answer],
            reference=SteppedBatch(loaded.model, loaded.adapter.encode_samples([sample]), [answer]),
            within=within,
        )
        for policy, scores in zip(bare, found, strict=True):
            expected = stepped.score(policy, [sample.id])[0]
            assert scores[i].kl == pytest.approx(expected.kl, abs=1e-4, rel=1e-3)
    # prompts of ways that nobody asks for any more are let go, and made again
    monkeypatch.setattr("avlprof.runtime.forced.samples.MOST_WAYS", 1)
    forced.score(Policy(pictures=PicturePolicy(kind=kind, share=0.2)))
    again = forced.score(policies[1])
    assert [score.kl for score in again] == pytest.approx([score.kl for score in found[1]], abs=1e-6)
    assert {way for way, _ in forced._smaller} == {shown}


def test_what_cannot_make_pictures_smaller_refuses(tiny, samples, tmp_path: Path) -> None:
    policy = Policy(name="half", vision_keep=0.5, pictures=PicturePolicy(kind="pooled", share=0.5))
    said = "policy 'half' makes pictures smaller .pooled to 0.5., and these prompts have them as they are"
    with pytest.raises(UserError, match=f"{said}; encode and run inside .*smaller_pictures"):
        with avlprof.apply(tiny.model, policy):
            pass
    batch = ForcedBatch(tiny.model, tiny.adapter.encode_samples(samples), [[5, 6]] * 4)
    with pytest.raises(UserError, match=said):
        batch.score(policy, "abcd")
    alone = ForcedSet([*"abcd"], [[5, 6]] * 4, [([0, 1, 2, 3], batch)])
    with pytest.raises(UserError, match="encoded elsewhere cannot be made smaller"):
        alone.score(policy)
    with pytest.raises(UserError, match="which kvpress does not, and its shares are of what they leave"):
        export_to("kvpress", policy, 6)
    path = save_policy(policy, tmp_path / "half.yaml")
    assert refused(invoke("trace", "--policy", path, "-n", 1, "-o", tmp_path / "run")).startswith(
        "policy 'half' makes pictures smaller (pooled to 0.5)"
    )
    resized = policy.model_copy(update={"pictures": PicturePolicy(kind="resized", share=0.5)})
    path = save_policy(resized, tmp_path / "resized.yaml")
    for command in (("run",), ("evaluate", "-n", 1, "-o", tmp_path / "evaluated")):
        assert "whatever its size" in refused(invoke(*command, "--policy", path))
    search = refused(invoke("tune", "--pictures", "whole,resized", "-n", 2, "-o", tmp_path / "study"))
    assert "whatever its size" in search
    # an ordinary context, as the refusal says
    with smaller_pictures(tiny, policy.pictures) as smaller:
        with avlprof.apply(smaller.model, policy.of_cache) as runtime:
            smaller.model.generate(**smaller.adapter.encode_samples(samples), max_new_tokens=2)
        assert runtime.cache is not None and [row.vision for row in runtime.cache.rows] == [90] * 4


def test_a_run_shows_dense_bytes_of_whole_pictures(tmp_path: Path) -> None:
    policy = Policy(vision_keep=0.5, pictures=PicturePolicy(kind="pooled", share=0.25))
    path = save_policy(policy, tmp_path / "quarter.yaml")
    done = invoke("run", "--policy", path, "--explain", "--format", "json", "--max-new-tokens", 2)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    token = 2 * 2 * 32 * 2  # keys and values of two KV heads of 32 numbers in 16 bits
    dense = {row["dense_live_kv"] // token for row in rows}
    assert len(dense) == 1 and {row["live_kv"] // token for row in rows} == {dense.pop() - 196 + 49 // 2}


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
    # timed, and beside flat policies of the same bytes that cut the pictures as they are
    fitted = [found.lineup.entries[1].policy]
    timed = evaluate(loaded, task, fitted, EvaluationSettings(samples=2, baselines=True, fidelity=False))
    table = timed.summary().set_index("policy")
    assert len(table) == 4 and (table["first_token_ms"] > 0).all()
    assert table["live_share"].drop("dense").between(0.33, 0.41).all()
