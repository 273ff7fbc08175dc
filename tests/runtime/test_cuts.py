"""Models without routes, against eager attention with an explicit mask of all pairs in fp64."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from avlprof.errors import UserError
from avlprof.policy import Policy
from avlprof.runtime import cuts as runtime_cuts
from avlprof.runtime.cuts import Cut, Route, cutting
from avlprof.runtime.forced import ForcedBatch, SteppedBatch
from avlprof.runtime.forced import rows as forced_rows
from avlprof.tasks import load_task
from avlprof.testing.families import families
from avlprof.testing.models import cases, random_llava
from tests.helpers import FEW, answers_of, generate, one_row, stepwise, thinned
from tests.hybrids import stateful, windowed
from tests.oracle import joined

MODELS = dict((*cases(), *families()))
BOTH_WAYS = ("paligemma", "paligemma2")
ROUTES = (
    "question-to-vision",
    "answer-to-vision",
    "answer-to-question",
    "generated-to-vision",
    "last-to-vision",
    "vision-to-vision",
    "question-to-question",
    "answer-to-answer",
)


@cache
def built(name):
    return MODELS[name]()


class Plain:
    """A model in eager fp64 attention with a mask of all pairs, from which a cut is taken."""

    def __init__(self, case, types=None):
        self.case, self.types = case, {"mm_token_type_ids": 0} | (types or {})

    def logits(self, inputs, answer, cut=None):
        """fp32 `[len(answer), V]` that give each token of the answer behind one unpadded prompt."""
        full = joined([(inputs, answer[:-1])], self.types)
        ids, prompt = full["input_ids"][0].tolist(), inputs["input_ids"].shape[1]
        self.cut, self.groups = cut, self.words(ids, prompt)
        model = self.case.model
        AttentionInterface.register("test_cuts", self.attention)
        AttentionMaskInterface.register("test_cuts", sdpa_mask)
        before = model.config.get_text_config()._attn_implementation
        model.set_attn_implementation({"text_config": "test_cuts"})
        try:
            with torch.no_grad():
                return model(**full, use_cache=False).logits[0, prompt - 1 :]
        finally:
            model.set_attn_implementation({"text_config": before})

    def words(self, ids, prompt):
        """What each position is."""
        vision = [i for i in range(prompt) if ids[i] in self.case.vision_token_ids]
        first = min(vision, default=prompt)
        words = ["system" if i < first else "question" for i in range(prompt)]
        for i in vision:
            words[i] = "vision"
        words[-1] = "last"
        return words + ["generated"] * (len(ids) - prompt)

    def attention(
        self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs
    ):
        heads, size, total = query.shape[1], query.shape[1] // key.shape[1], query.shape[2]
        k, v = (t.repeat_interleave(size, dim=1)[0].double() for t in (key, value))
        logits = query[0].double() @ k.mT * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = attention_mask[0, 0]
        seen = seen.expand(heads, -1, -1).clone()
        if self.cut is not None and module.layer_idx in self.cut.layers:
            answer = ("last", "generated")
            source, target = (
                torch.tensor([word in (answer if end == "answer" else (end,)) for word in self.groups])
                for end in (self.cut.route.source, self.cut.route.target)
            )
            cut = source[:, None] & target & ~torch.eye(total, dtype=torch.bool)
            seen[slice(None) if self.cut.heads is None else list(self.cut.heads)] &= ~cut
        logits = logits.masked_fill(~seen, -math.inf)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.double().view(-1, 1, 1).expand(-1, total, 1)], dim=-1)
        weights = logits.softmax(-1)[..., :total]
        return (weights @ v).transpose(0, 1)[None].to(query.dtype), None


def check(score, dense, ours, answer):
    """A score is what its formulas say of these logits."""
    p, q = (logits.double().log_softmax(-1) for logits in (dense, ours))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert score.kl == pytest.approx(float(kl), abs=1e-4)
    assert score.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    said = q[torch.arange(len(answer)), torch.tensor(answer)].mean()
    assert score.log_likelihood == pytest.approx(float(said), abs=1e-4)


def compare(case, inputs, answers, cuts, types=None, counts=None, kind=ForcedBatch):
    """Cuts on each row of a batch against the plain model; returns the batch and the divergences."""
    batch = kind(case.model, inputs, answers)
    scores = batch.score_cuts(cuts, [str(i) for i in range(len(answers))])
    plain = Plain(case, types)
    for row, answer in enumerate(answers):
        single = one_row(case, inputs, row, counts) if len(answers) > 1 else inputs
        dense = plain.logits(single, answer)
        for cut, own in zip(cuts, scores, strict=True):
            check(own[row], dense, plain.logits(single, answer, cut), answer)
    return batch, {cut.name: own[0].kl for cut, own in zip(cuts, scores, strict=True)}


def one_pass(batch, route):
    """Whether a batch scores a route in one pass, and not token by token."""
    return batch._cut_answers(Route.of(route).source) is not None


@pytest.mark.parametrize(
    "name", thinned(dict(cases()), ("qwen2_5_vl-6q2kv", "llava-4q2kv-sinks"), ("qwen2_5_vl-6q2kv",))
)
def test_a_ragged_batch_is_what_a_mask_says(name):
    """Prompts of unequal length, one without a picture, answers down to one token; one head of one layer."""
    case, counts = built(name), [1, 1, 0, 1]
    inputs = case.inputs(batch=4, seed=21, pad=True, text=11, images_per_row=counts)
    heads = case.model.config.get_text_config().num_attention_heads
    routes = [Route.of(route) for route in ROUTES]
    cuts = [Cut(route, (0, 1)) for route in routes]
    cuts += [Cut(routes[number], (1,), (heads - 1,)) for number in (0, 1, 5)]
    batch, kl = compare(case, inputs, answers_of((9, 1, 5, 4)), cuts, counts=counts)
    assert min(kl.values()) > 1e-6
    assert [one_pass(batch, r) for r in ROUTES] == [not r.startswith("vision") for r in ROUTES]


@pytest.mark.parametrize(
    "name", thinned(dict(families()), (*FEW, "paligemma", "internvl_gpt_oss"), ("gemma3", "paligemma"))
)
def test_families_are_what_a_mask_says(name):
    """Sliding windows, soft caps, sinks, tiles, pictures and whole prompts that attend both ways."""
    case = built(name)
    inputs = case.inputs(batch=1, seed=23, text=9)
    routes = ("question-to-vision", "answer-to-vision", "vision-to-system")
    cuts = [Cut(Route.of(route), (1, 2)) for route in routes]
    types = {"token_type_ids": int(name in BOTH_WAYS)}
    batch, kl = compare(case, inputs, answers_of((6,)), cuts, types)
    assert min(kl.values()) > 1e-7
    assert [one_pass(batch, route) for route in routes[:2]] == [name not in BOTH_WAYS] * 2
    assert not one_pass(batch, routes[2])


def test_text_between_pictures_is_question_too():
    """The rows in front of the second picture look at the first, so the picture has to run again."""
    case = built("llava-4q2kv")
    inputs = case.inputs(batch=2, seed=5, text=11, images_per_row=2)
    cut = Cut(Route.of("question-to-vision"), (0,))
    batch, _ = compare(case, inputs, answers_of((4, 6)), [cut], counts=[2, 2])
    assert not one_pass(batch, "question-to-vision")
    assert one_pass(batch, "answer-to-vision")


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_in_passes_and_blocks_of_any_size(attention, monkeypatch):
    """Many cuts at once, one to a pass, and rows one by one: all the same, also token by token."""
    case = random_llava(3)
    case.model.set_attn_implementation({"text_config": attention})
    inputs = case.inputs(batch=2, seed=8, pad=True, text=9)
    answers, names = answers_of((2, 4)), list("ab")
    routes = [Route.of(name) for name in ("question-to-vision", "answer-to-vision")]
    cuts = [Cut(route, (layer,)) for route in routes for layer in (0, 2)]
    cuts += [Cut(routes[0], (1,), (head,)) for head in (0, 3)]
    together = ForcedBatch(case.model, inputs, answers).score_cuts(cuts, names)
    stepped = SteppedBatch(case.model, inputs, answers).score_cuts(cuts, names)
    monkeypatch.setattr("avlprof.runtime.forced.cuts._ROWS", 1)
    monkeypatch.setattr(forced_rows, "_WEIGHTS", 1)
    apart = ForcedBatch(case.model, inputs, answers).score_cuts(cuts, names)
    monkeypatch.setattr(runtime_cuts, "_WEIGHTS", 1)
    slowly = SteppedBatch(case.model, inputs, answers).score_cuts(cuts[:1], names)
    for one, others in zip(together, zip(stepped, apart, strict=True), strict=True):
        for other in others:
            assert [s.kl for s in one] == pytest.approx([s.kl for s in other], abs=1e-5)
            assert [s.agreement for s in one] == [s.agreement for s in other]
    assert [s.kl for s in slowly[0]] == pytest.approx([s.kl for s in together[0]], abs=1e-5)
    assert len({round(one[0].kl, 7) for one in together}) == len(cuts), "cuts differ"


def test_a_layer_that_keeps_no_vision_is_one_without_the_route():
    """Evicting a layer's whole picture is closing `generated-to-vision` there."""
    case = built("qwen2_5_vl-6q2kv")
    inputs = case.inputs(batch=3, seed=4, pad=True, text=9)
    answers, names = answers_of((6, 1, 5)), list("abc")
    policies = [Policy(vision_keep=tuple(float(i != layer) for i in range(3))) for layer in range(3)]
    batch = ForcedBatch(case.model, inputs, answers)
    route = Route.of("generated-to-vision")
    ours = batch.score_cuts([Cut(route, (layer,)) for layer in range(3)], names)
    theirs = batch.score_many(policies, names)
    for one, other in zip(ours, theirs, strict=True):
        assert [s.kl for s in one] == pytest.approx([s.kl for s in other], abs=1e-5)
        assert one[1].kl == 0.0, "the first token is the prompt's"
        assert one[0].kl > 1e-5


def test_a_generation_runs_without_the_route():
    """Steps of `generate` under a cut are those of the plain model, and nothing stays behind."""
    case = built("llava-4q2kv")
    inputs = case.inputs(batch=1, seed=6, text=9)
    cut = Cut(Route.of("answer-to-vision"), (0, 1, 2))
    before = generate(case.model, inputs, 6)
    with cutting(case.model, cut):
        ours = generate(case.model, inputs, 6)
    answer = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    wanted = Plain(case).logits(inputs, answer, cut)
    torch.testing.assert_close(torch.cat(ours.logits), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.equal(ours.logits[0], before.logits[0])
    assert torch.equal(generate(case.model, inputs, 6).logits[0], before.logits[0])


@pytest.mark.parametrize("make", [windowed, stateful])
def test_hybrids_are_cut_where_they_attend(tiny, make):
    """Layers with a window in one pass, layers beside a state token by token; as the plain model has it."""
    hybrid = make(tiny)
    samples = load_task("shapes:count").samples("search", 1)
    inputs = hybrid.adapter.encode_samples(samples)

    class Case:
        model, vision_token_ids = hybrid.model, hybrid.adapter.vision_token_ids

    cut = Cut(Route.of("question-to-vision"), (0, 1, 2, 3, 4) if make is windowed else (1, 4))
    kind = ForcedBatch if make is windowed else SteppedBatch
    _, kl = compare(Case, inputs, answers_of((4,)), [cut], kind=kind)
    assert kl[cut.name] > 1e-6


def test_what_is_no_route_is_said():
    with pytest.raises(UserError, match="SOURCE-to-TARGET"):
        Route.of("question->vision")
    with pytest.raises(UserError, match="'pictures'"):
        Route.of("question-to-pictures")
    with pytest.raises(UserError, match="at least one layer"):
        Cut(Route.of("question-to-vision"), ())
    case = built("llava-4q2kv")
    cut = Cut(Route.of("question-to-vision"), (0,))
    with cutting(case.model, cut), pytest.raises(UserError, match="already runs under a policy"):
        stepwise(case.model, case.inputs(1), [[5, 6]], Policy(vision_keep=0.5))
