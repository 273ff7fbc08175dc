"""Forced scoring against the stepwise runtime, and its scores against plain formulas."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from avlprof.errors import UserError
from avlprof.policy import DENSE, CoreScore, Policy, PrefillFilter, ScorerSpec, TextPolicy
from avlprof.runtime.forced import ForcedBatch, ForcedSet
from avlprof.runtime.forced import batch as forced_batch
from avlprof.runtime.forced import rows as forced_rows
from avlprof.runtime.forced import score as forced_score
from avlprof.runtime.forced.packing import (
    answer_groups,
    parts,
    policy_groups,
    runs,
)
from avlprof.runtime.forced.score import Head
from avlprof.tasks import load_task
from avlprof.testing.families import families, random_gemma3, random_paligemma2
from avlprof.testing.models import cases, random_llava
from tests.helpers import answers_of, few, steps_and_first, stepwise, thinned
from tests.policies import FORCED, POLICIES, TESTED

MODELS = dict(cases())
LENGTHS = (19, 7, 1, 13, 7)


@pytest.fixture(scope="module", params=few(MODELS, ("qwen2_5_vl-6q2kv",)))
def case(request):
    return MODELS[request.param]()


def ragged(case):
    """Prompts of unequal length with two pictures, one and none, and answers down to one token."""
    inputs = case.inputs(batch=5, seed=21, pad=True, text=11, images_per_row=[1, 2, 1, 0, 1])
    return inputs, answers_of(LENGTHS)


@pytest.mark.parametrize(
    "name", thinned(FORCED, (*TESTED, "newest grow"), ("history", "filter", "packed", "packed core"))
)
def test_forced_is_the_stepwise_runtime(case, name):
    inputs, answers = ragged(case)
    ours = ForcedBatch(case.model, inputs, answers).logits(FORCED[name])
    theirs = stepwise(case.model, inputs, answers, FORCED[name])
    for row, answer in enumerate(answers):
        a, b = ours[row, : len(answer) - 1], theirs[row, : len(answer) - 1]
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert not ours[row, len(answer) - 1 :].any()


def test_a_core_ranked_by_the_prompt_alone_never_changes(case):
    """In the runtime and in forced scoring: it is the static core, whatever rows are remembered."""
    inputs, answers = ragged(case)
    static = POLICIES["static core"]
    scored = static.model_copy(
        update={
            "refresh_interval": 2,
            "refresh": "score_only",
            "core_score": CoreScore(prompt=1.0, memory=0.5),
        }
    )
    wanted = ForcedBatch(case.model, inputs, answers).logits(static)
    torch.testing.assert_close(ForcedBatch(case.model, inputs, answers).logits(scored), wanted)
    ours, theirs = (stepwise(case.model, inputs, answers, policy) for policy in (scored, static))
    for row, answer in enumerate(answers):
        torch.testing.assert_close(ours[row, : len(answer) - 1], theirs[row, : len(answer) - 1])


@pytest.mark.parametrize("name", few(["core, k=3", "h2o", "filter", "dense"], 1))
def test_scores_are_their_formulas(case, name):
    """The first token counts: only a prefill filter changes it."""
    inputs, answers = ragged(case)
    ids = list("abcde")
    found = ForcedBatch(case.model, inputs, answers).score(FORCED[name], ids)
    dense, ours = (steps_and_first(case.model, inputs, answers, p).double() for p in (DENSE, FORCED[name]))
    for row, (answer, score) in enumerate(zip(answers, found, strict=True)):
        kl = likelihood = agree = 0.0
        for step, token in enumerate(answer):
            p, q = dense[row, step].softmax(-1), ours[row, step].softmax(-1)
            kl += float((p * (p / q).log()).sum())
            likelihood += float(q[token].log())
            agree += float(p.argmax() == q.argmax())
        tokens = len(answer)
        assert (score.sample, score.tokens) == (ids[row], tokens)
        assert score.kl == pytest.approx(kl / tokens, abs=1e-4)
        assert score.log_likelihood == pytest.approx(likelihood / tokens, abs=1e-4)
        assert score.agreement == pytest.approx(agree / tokens)
    if name == "filter":
        assert found[2].kl > 0


def test_an_empty_answer_is_a_perfect_one(case):
    inputs = case.inputs(batch=2, seed=1)
    first, second = ForcedBatch(case.model, inputs, [[], [7]]).score(POLICIES["evict"], ["a", "b"])
    assert (first.tokens, first.kl, first.agreement, first.log_likelihood) == (0, 0.0, 1.0, 0.0)
    assert (second.tokens, second.kl, second.agreement) == (1, 0.0, 1.0)
    assert second.log_likelihood < 0


def close(a, b):
    assert a.sample == b.sample
    assert a.tokens == b.tokens
    assert a.kl == pytest.approx(b.kl, abs=1e-4)
    assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-4)
    assert a.agreement == b.agreement


def first_layers(policy, layers):
    """The policy for a model of fewer layers."""
    data = policy.model_dump()
    for part in (data, data["text"], data["joint"] or {}):
        for name, value in part.items():
            if isinstance(value, tuple) and name != "prefill_filter":
                part[name] = value[:layers]
    return Policy(**data)


def near(policy, share):
    """The same policy at other shares, which shares its passes."""
    if policy.joint is not None:
        return policy.model_copy(update={"joint": policy.joint.model_copy(update={"keep": share})})
    compute = None if policy.vision_compute is None else share / 2
    return policy.model_copy(update={"vision_keep": share, "vision_compute": compute})


MIXED = (
    "evict",
    "core, k=3",
    "scored core",
    "score only",
    "history",
    "heavy",
    "streaming",
    "tova",
    "snapkv",
    "filter",
)


@pytest.mark.parametrize("limits", few([(1 << 20, 1024), (1, 1), (3000, 60)], [(3000, 60)]))
def test_policies_together_score_as_one_by_one(limits, monkeypatch):
    """Whatever parts memory allows: of rows, of policies, of answers."""
    case = random_llava(layers=2)
    inputs, answers = ragged(case)
    some = [first_layers(POLICIES[name], 2) for name in MIXED]
    policies = [p for policy in some for p in (policy, near(policy, 0.3))]
    alone = ForcedBatch(case.model, inputs, answers)
    wanted = [alone.score(policy, "abcde") for policy in policies]
    monkeypatch.setattr(forced_rows, "_WEIGHTS", limits[0])
    monkeypatch.setattr(forced_batch, "_ROWS", limits[1])
    monkeypatch.setattr(forced_score, "_LOGITS", limits[0])
    found = ForcedBatch(case.model, inputs, answers).score_many(policies, "abcde")
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


def test_rows_do_not_know_each_other(case):
    inputs, answers = ragged(case)
    together = ForcedBatch(case.model, inputs, answers).logits(POLICIES["history"])
    other = [answers[0], *answers_of((4, 2, 9, 30), seed=8)]
    changed = ForcedBatch(case.model, inputs, other).logits(POLICIES["history"])
    steps = len(answers[0]) - 1
    torch.testing.assert_close(together[0, :steps], changed[0, :steps], atol=1e-5, rtol=1e-5)


def test_prompts_run_once_for_all_that_need_no_more(case):
    inputs, answers = ragged(case)
    runs = []
    hook = case.model.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append("pixel_values" in kwargs), with_kwargs=True
    )
    specs = [ScorerSpec(name="instruction"), ScorerSpec(name="last_query")]
    batch = ForcedBatch(case.model, inputs, answers, scorers=specs)
    for policy in (
        DENSE,
        POLICIES["evict"],
        Policy(vision_keep=0.5, scorer="instruction"),
        POLICIES["window"],
    ):
        batch.score_many([policy, POLICIES["core, k=3"]], "abcde")
    assert sum(runs) == 1
    batch.score(POLICIES["accumulated"], "abcde")
    batch.score(POLICIES["history"], "abcde")
    assert sum(runs) == 3
    batch.score(POLICIES["filter"], "abcde")
    batch.score(POLICIES["filter"], "abcde")
    hook.remove()
    assert sum(runs) == 4


def test_views_of_prompts_share_their_memory(case):
    inputs, answers = ragged(case)
    batch = ForcedBatch(case.model, inputs, answers)
    batch.score_many([POLICIES["evict"], near(POLICIES["evict"], 0.3)], "abcde")
    held = batch._prefixes
    whole = {layer.key.untyped_storage().data_ptr() for layer in held._prompts[""].layers}
    views = {layer.key.untyped_storage().data_ptr() for view in held._views.values() for layer in view.layers}
    assert views == whole
    before = batch.nbytes
    batch.drop()
    assert batch.nbytes == 0 < before
    again = batch.score(POLICIES["evict"], "abcde")
    for a, b in zip(
        again, ForcedBatch(case.model, inputs, answers).score(POLICIES["evict"], "abcde"), strict=True
    ):
        close(a, b)


FAMILIES = dict(families())


@pytest.mark.parametrize("name", [*FAMILIES, *MODELS])
@torch.no_grad()
def test_the_head_gives_the_models_logits(name):
    case = (FAMILIES | MODELS)[name]()
    check_head(case.model, case.inputs(2, seed=3))


@pytest.mark.parametrize("build", [random_gemma3, random_paligemma2])
@torch.no_grad()
def test_a_soft_cap_on_the_logits_is_in_the_head(build):
    case = build()
    case.model.config.get_text_config().final_logit_softcapping = 1.5
    check_head(case.model, case.inputs(2, seed=3))


def check_head(model, inputs):
    head = Head(model)
    with head.watched() as seen:
        logits = model(**inputs).logits
    torch.testing.assert_close(head.logits(seen.rows), logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(seen.first, seen.rows[:, -1])
    with head.watched(short=True) as seen:
        spared = model(**inputs).logits
    assert head.logits(seen.rows).shape == logits.shape
    torch.testing.assert_close(spared[:, -1], logits[:, -1], atol=1e-5, rtol=1e-5)


def test_logits_stand_in_for_a_head_of_another_kind():
    case = random_gemma3()
    inputs, answers = case.inputs(2, seed=21, pad=True, text=11), answers_of((9, 5))
    hook = case.model.register_forward_hook(
        lambda module, args, out: replace(out, logits=torch.sinh(out.logits / 4))
    )
    ours = ForcedBatch(case.model, inputs, answers).logits(POLICIES["evict"])
    theirs = stepwise(case.model, inputs, answers, POLICIES["evict"])
    hook.remove()
    for row, answer in enumerate(answers):
        a, b = ours[row, : len(answer) - 1], theirs[row, : len(answer) - 1]
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def padded(groups, steps):
    return sum(len(group) * max(steps[i] for i in group) for group in groups)


def test_groups_of_answers_cost_least():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 8):
        steps = sorted(torch.randint(0, 60, (count,), generator=generator).tolist())
        groups = answer_groups(steps, 10_000)
        first = sum(n == 0 for n in steps)
        assert [i for group in groups for i in group] == list(range(first, count))
        options = []
        for cuts in itertools.product((False, True), repeat=max(count - first - 1, 0)):
            edges = [first, *(first + i + 1 for i, cut in enumerate(cuts) if cut), count]
            options.append([range(a, b) for a, b in itertools.pairwise(edges) if b > a])
        price = [padded(option, steps) + 24 * len(option) for option in options]
        assert padded(groups, steps) + 24 * len(groups) == min(price)
    for group in answer_groups([9] * 40, 100):
        assert len(group) * 9 <= 100
    assert answer_groups([500, 500], 100) == [range(0, 1), range(1, 2)]


def test_runs_and_parts_hold_what_they_may():
    assert list(runs("abcde", [3, 3, 9, 1, 2], 6)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(parts(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(parts(range(4), 0)) == [[0], [1], [2], [3]]


def test_policies_share_a_pass_only_where_they_differ_in_shares():
    base = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=3)
    alike = [base, near(base, 0.3), base.model_copy(update={"scorer": ScorerSpec(name="instruction")})]
    apart = [
        base.model_copy(update={"refresh_interval": 4}),
        base.model_copy(update={"refresh": "score_only"}),
        base.model_copy(update={"core_score": CoreScore(prompt=0.5)}),
        base.model_copy(update={"heads": "kv_head"}),
        base.model_copy(update={"text": TextPolicy(window=5)}),
        base.model_copy(update={"prefill_filter": (PrefillFilter(after_layer=1, keep=0.5),)}),
        POLICIES["tova"],
        POLICIES["h2o"],
    ]
    assert policy_groups([*alike, *apart]) == [[0, 1, 2], *([i] for i in range(3, 11))]


TASK = "shapes:read,count"


@pytest.fixture(scope="module")
def samples():
    return load_task(TASK).samples("search", 7)


@pytest.mark.full  # every score twice
def test_a_set_is_its_batches(tiny, samples):
    """Answers come from the run that noted the prompts; batches of any size score alike."""
    policies = [Policy(vision_keep=0.2, scorer="instruction"), DENSE]
    small = ForcedSet.prepare(tiny, samples, max_new_tokens=9, batch_size=3)
    large = ForcedSet.prepare(tiny, samples, max_new_tokens=9, scorers=[ScorerSpec(name="instruction")])
    assert small.answers == large.answers
    assert small.shapes == large.shapes
    inputs = tiny.adapter.encode([s.prompt for s in samples], [s.open_images() for s in samples])
    new = tiny.model.generate(**inputs, max_new_tokens=9, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for answer, row in zip(large.answers, new.tolist(), strict=True):
        assert answer == row[: len(answer)]
    parts_found = [score(policies) for score in small.batches()]
    assert [len(part[0]) for part in parts_found] == [3, 3, 1]
    for ours, theirs in zip(small.score_many(policies), large.score_many(policies), strict=True):
        assert [score.sample for score in ours] == [sample.id for sample in samples]
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
    assert [score.kl for score in large.score(DENSE)] == pytest.approx([0.0] * 7, abs=1e-6)


@pytest.mark.full  # every score twice
def test_memory_is_bounded_and_scores_stay(tiny, samples):
    policy = Policy(vision_keep=0.2)
    free = ForcedSet.prepare(tiny, samples, max_new_tokens=9, batch_size=2)
    wanted = free.score(policy)
    allowed = free.nbytes // 2
    tight = ForcedSet.prepare(tiny, samples, max_new_tokens=9, batch_size=2, memory=allowed)
    assert 0 < tight.nbytes <= allowed
    for _ in range(2):
        for a, b in zip(tight.score(policy), wanted, strict=True):
            close(a, b)
        assert tight.nbytes <= allowed


def test_references_can_be_the_answers(tiny, samples):
    forced = ForcedSet.prepare(tiny, samples, max_new_tokens=30, answers="reference", batch_size=4)
    end = tiny.model.generation_config.eos_token_id
    for answer, sample in zip(forced.answers, samples, strict=True):
        assert answer[-1] == end
        assert tiny.adapter.decode([answer]) == [sample.answers[0]]
    inputs = tiny.adapter.encode([samples[0].prompt], [samples[0].open_images()])
    logits = steps_and_first(tiny.model, inputs, forced.answers[:1], POLICIES_TINY)[0].log_softmax(-1)
    wanted = [float(row[token]) for row, token in zip(logits, forced.answers[0], strict=True)]
    assert forced.score(POLICIES_TINY)[0].log_likelihood == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


POLICIES_TINY = Policy(vision_keep=0.3, vision_compute=0.1, refresh_interval=3)


def test_a_sample_without_a_reference_is_refused(tiny, samples):
    with pytest.raises(UserError, match=f"sample '{samples[0].id}' has no reference answer"):
        ForcedSet.prepare(tiny, [replace(samples[0], answers=())], max_new_tokens=9, answers="reference")
