"""Forced scoring against the stepwise runtime, and its scores against plain formulas."""

from __future__ import annotations

import pytest
import torch

import avlprof
from avlprof.policy import DENSE, JointPool, Policy, ScorerSpec
from avlprof.runtime.forced import ForcedBatch
from avlprof.testing.models import cases

from .test_runtime import POLICIES

MODELS = dict(cases())
EXTRA = {
    "dense": DENSE,
    "k larger than the answer": Policy(vision_keep=0.5, vision_compute=0.1, refresh_interval=32),
    "random": Policy(vision_keep=0.4, scorer=ScorerSpec(name="random", options={"seed": 3})),
    "streaming": Policy(pool="joint", joint=JointPool(keep=0.4, sink=2), scorer=ScorerSpec(name="position")),
}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request):
    return MODELS[request.param]()


def stepwise(model, inputs, answers, policy):
    """Logits of the runtime, fed the answers token by token."""
    steps = max(len(answer) for answer in answers) - 1
    tokens = torch.tensor([answer + [0] * (steps + 1 - len(answer)) for answer in answers])
    full = torch.cat([inputs["input_ids"], tokens], dim=1)

    def forced(batch, ids):
        return [int(full[batch, len(ids)])] if len(ids) < full.shape[1] else [0]

    with avlprof.apply(model, policy):
        out = model.generate(
            **inputs,
            max_new_tokens=steps + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=forced,
        )
    return torch.stack(out.logits[1:], dim=1)


@pytest.mark.parametrize("name", [*POLICIES, *EXTRA])
def test_forced_is_the_stepwise_runtime(case, name):
    policy = (POLICIES | EXTRA)[name]
    inputs = case.inputs(batch=3, seed=21, pad=True, text=11, images_per_row=[1, 2, 1])
    generator = torch.Generator().manual_seed(5)
    answers = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in (19, 7, 13)]
    ours = ForcedBatch(case.model, inputs, answers).logits(policy)
    theirs = stepwise(case.model, inputs, answers, policy)
    for row, answer in enumerate(answers):
        a, b = ours[row, : len(answer) - 1], theirs[row, : len(answer) - 1]
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_scores_are_their_formulas(case):
    policy = POLICIES["core, k=3"]
    inputs = case.inputs(batch=2, seed=1, pad=True)
    answers = [[5, 9, 11, 40, 8], [7, 6]]
    batch = ForcedBatch(case.model, inputs, answers)
    scores = batch.score(policy, ["a", "b"])
    dense, ours = batch.logits(DENSE).double(), batch.logits(policy).double()
    for row, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        kl = likelihood = agree = 0.0
        for step in range(len(answer) - 1):
            p, q = dense[row, step].softmax(-1), ours[row, step].softmax(-1)
            kl += float((p * (p / q).log()).sum())
            likelihood += float(q[answer[step + 1]].log())
            agree += float(p.argmax() == q.argmax())
        steps = len(answer) - 1
        assert (score.sample, score.tokens) == ("ab"[row], steps)
        assert score.kl == pytest.approx(kl / steps, abs=1e-4)
        assert score.log_likelihood == pytest.approx(likelihood / steps, abs=1e-4)
        assert score.agreement == pytest.approx(agree / steps)


def test_dense_scores_perfectly(case):
    inputs = case.inputs(batch=2, seed=1)
    for score in ForcedBatch(case.model, inputs, [[5, 9, 11], [7, 6, 8]]).score(DENSE, ["a", "b"]):
        assert score.kl == pytest.approx(0, abs=1e-6)
        assert score.agreement == 1
