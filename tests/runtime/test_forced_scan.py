"""Forced scoring row by row, where what a row evicts decides what later rows see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avlprof.attention.modality import modality_map
from avlprof.attention.ranking import ranks
from avlprof.attention.session import switched
from avlprof.policy import (
    JointPool,
    Policy,
    PrefillFilter,
    PromptShape,
    ScorerSpec,
    TextPolicy,
    sizes,
    text_room,
)
from avlprof.runtime.forced import ForcedBatch
from avlprof.runtime.forced import rows as forced_rows
from avlprof.runtime.forced.attention import windows
from avlprof.runtime.forced.prompt import Capture, left_aligned, text_weights
from avlprof.runtime.forced.rows import Plans
from avlprof.runtime.forced.scan import Pool
from avlprof.scorers import Prefill
from avlprof.testing.families import families
from avlprof.testing.models import random_llava, random_qwen2_5_vl
from tests.helpers import FEW, answers_of, stepwise, thinned
from tests.oracle import NEAR_TIE, Oracle

BUILDERS = {
    "llava": random_llava,
    "one group": lambda: random_llava(3, heads=4, kv_heads=1),
    "qwen2_5_vl": random_qwen2_5_vl,
}
LAYERS = 3


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request):
    return BUILDERS[request.param]()


def drawn(seed):
    """A random policy whose text or pool is evicted by score."""
    draw = np.random.default_rng(seed)

    def share(low, high):
        return tuple(round(float(v), 3) for v in draw.uniform(low, high, LAYERS))

    heads = ("shared", "kv_head")[draw.integers(2)]
    if draw.random() < 0.4:
        recent = {"recent": int(draw.integers(0, 6))} if draw.random() < 0.5 else {"recent_share": 0.4}
        joint = JointPool(keep=share(0.1, 0.7), sink=int(draw.integers(0, 4)), **recent)
        return Policy(
            pool="joint",
            joint=joint,
            scorer=ScorerSpec(name=("last_query", "accumulated")[draw.integers(2)]),
            heads=heads,
        )
    kept = share(0.3, 0.9)
    if draw.random() < 0.4:
        counts = [tuple(int(n) for n in draw.integers(low, 6, LAYERS)) for low in (1, 0, 0)]
        text = TextPolicy(window=counts[0], sink=counts[1], heavy=(2, *counts[2][1:]), scorer="accumulated")
    else:
        text = TextPolicy(
            keep=share(0.1, 0.9),
            minimum=int(draw.integers(1, 7)),
            recent=round(float(draw.random()), 2),
            scorer=("history", "accumulated")[draw.integers(2)],
        )
    return Policy(
        vision_keep=kept,
        vision_compute=tuple(k / 2 for k in kept),
        refresh_interval=int(draw.integers(0, 5)),
        refresh=("full", "score_only")[draw.integers(2)],
        heads=heads,
        text=text,
    )


@pytest.mark.parametrize("seed", thinned(range(10), range(3)))
def test_random_policies_are_the_plain_oracle(case, seed):
    policy = drawn(seed)
    assert policy.running is not None
    for other in range(seed, seed + 500, 100):
        inputs = case.inputs(1, seed=other, text=12)
        answer = answers_of([16], other)[0]
        theirs, trace = Oracle(case.model, policy, case.vision_token_ids).run(inputs, answer[:-1])
        if trace.gap >= NEAR_TIE:
            break
    assert trace.gap >= NEAR_TIE, "near-ties decide the sets of every seed"
    ours = ForcedBatch(case.model, inputs, [answer]).logits(policy)[0]
    torch.testing.assert_close(ours, theirs[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", thinned(range(20, 32), range(20, 26), (21, 23)))
def test_random_policies_in_few_bits_are_the_plain_oracle(case, seed):
    """With or without a core and scored text: what leaves the core is as the oracle quantises it."""
    draw = np.random.default_rng(seed)
    policy = next(p for p in map(drawn, range(seed, seed + 99)) if p.joint is None)
    bits = tuple(int(n) for n in draw.choice([16, 8, 4, 3, 2], LAYERS))
    text = policy.text if draw.random() < 0.5 else TextPolicy()
    compute = policy.vision_compute if draw.random() < 0.7 else None
    policy = policy.model_copy(update={"vision_bits": bits, "text": text, "vision_compute": compute})
    for other in range(seed, seed + 1500, 100):
        inputs = case.inputs(1, seed=other, text=12)
        answer = answers_of([16], other)[0]
        theirs, trace = Oracle(case.model, policy, case.vision_token_ids).run(inputs, answer[:-1])
        if trace.gap >= NEAR_TIE:
            break
    assert trace.gap >= NEAR_TIE, "near-ties decide the sets of every seed"
    ours = ForcedBatch(case.model, inputs, [answer]).logits(policy)[0]
    torch.testing.assert_close(ours, theirs[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 5, 7])
def test_blocks_of_rows_give_the_same(case, seed, monkeypatch):
    policy = drawn(seed)
    inputs = case.inputs(2, seed=seed, text=12, pad=True)
    answers = answers_of((14, 9), seed)
    whole = ForcedBatch(case.model, inputs, answers).logits(policy)
    monkeypatch.setattr(forced_rows, "_WEIGHTS", 2 * 4 * 60 * 5)
    torch.testing.assert_close(
        ForcedBatch(case.model, inputs, answers).logits(policy), whole, atol=1e-5, rtol=1e-5
    )


SCORED = Policy(
    vision_keep=0.6,
    vision_compute=0.3,
    refresh_interval=3,
    refresh="score_only",
    text=TextPolicy(keep=0.5, minimum=4, scorer="history"),
)
FAMILIES = dict(families())


@pytest.mark.parametrize("name", thinned(FAMILIES, FEW, ("qwen3_vl", "gemma3")))
def test_every_family_agrees_with_its_runtime(name):
    case = FAMILIES[name]()
    inputs = case.inputs(2, seed=21, pad=True, text=11)
    answers = answers_of((15, 8))
    policies = [SCORED]
    if all(window is None for window in windows(case.model.config.get_text_config(decoder=True))):
        filtered = (PrefillFilter(after_layer=1, keep=0.5),)
        policies.append(SCORED.model_copy(update={"prefill_filter": filtered}))
    for policy in policies:
        ours = ForcedBatch(case.model, inputs, answers).logits(policy)
        theirs = stepwise(case.model, inputs, answers, policy)
        for row, answer in enumerate(answers):
            a, b = ours[row, : len(answer) - 1], theirs[row, : len(answer) - 1]
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_ranks_put_the_lower_index_first_among_equals():
    scores = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.9])
    assert ranks(scores).tolist() == [2, 0, 3, 4, 1]


def test_left_aligned_tokens_keep_their_order():
    marked = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]]).bool()
    order, real = left_aligned(marked)
    assert order[0].tolist() == [1, 3, 4]
    assert order[1, :2].tolist() == [0, 4]
    assert real.tolist() == [[True, True, True], [True, True, False]]


def test_text_weights_are_the_rows_of_text(case):
    """Group means of the softmax rows, text columns alone, whatever the padding."""
    inputs = case.inputs(3, seed=2, pad=True, images_per_row=[1, 0, 2])
    seen = []

    class Watch(Capture):
        def keep(self, call, prefill, columns):
            seen.append(prefill)

    with torch.no_grad(), switched(case.model, observers=(Watch([]),)):
        case.model(**inputs)
    prefill: Prefill = seen[1]
    found = text_weights(prefill)
    groups = prefill.key.shape[1]
    modality = modality_map(inputs["input_ids"], inputs["attention_mask"], case.vision_token_ids)
    size = prefill.query.shape[1] // groups
    for row, codes in enumerate(modality):
        text = [i for i, code in enumerate(codes.tolist()) if code == 2]
        assert not found[row, :, len(text) :].any()
        assert not found[row, :, :, len(text) :].any()
        for group in range(groups):
            for i, t in enumerate(text):
                mean = torch.zeros(len(codes))
                for head in range(group * size, (group + 1) * size):
                    products = prefill.key[row, group] @ prefill.query[row, head, t] * prefill.scaling
                    hidden = (codes < 0) | (torch.arange(len(codes)) > t)
                    mean += products.masked_fill(hidden, float("-inf")).softmax(-1) / size
                torch.testing.assert_close(
                    found[row, group, i, : len(text)], mean[text], atol=1e-6, rtol=1e-4
                )


def test_rooms_are_those_of_the_policy():
    policy = Policy(text=TextPolicy(keep=(0.5, 0.2), minimum=3, recent=0.4, scorer="accumulated"))
    shapes = [PromptShape(2, 9, 4), PromptShape(1, 0, 11)]
    plans = Plans([policy], shapes, 2, 6, torch.device("cpu"))
    for layer in range(2):
        room = plans.room(layer)
        for row, shape in enumerate(shapes):
            for step in range(7):
                wanted = text_room(policy, shape.text + step, 0, layer)
                assert (int(room.limit[row, 0, step]), int(room.newest[row, 0, step])) == wanted
    pools = [
        Policy(pool="joint", joint=JointPool(keep=k, sink=3, recent=2), scorer="last_query")
        for k in (0.0, 0.6)
    ]
    plans = Plans(pools, shapes, 2, 3, torch.device("cpu"))
    for column, pool in enumerate(pools):
        for row, shape in enumerate(shapes):
            held = sizes(pool, shape, 2)[1].text
            room = plans.room(1)
            assert int(plans.vision(1)[0][row, column]) == held
            assert int(room.limit[row, column, 0]) == held
            assert int(room.limit[row, column, 2]) == text_room(pool, 0, held, 1)[0]
            assert int(room.sink[row, column]) == min(3, held)


def test_a_pool_never_holds_more_than_its_room(case):
    """Nor does it lose a sink or one of the newest; each policy and head by itself."""
    inputs = case.inputs(2, seed=4, pad=True, text=14)
    policies = [
        Policy(pool="joint", joint=JointPool(keep=k, sink=2, recent=3), scorer="accumulated", heads="kv_head")
        for k in (0.3, 0.5)
    ]
    batch = ForcedBatch(case.model, inputs, answers_of((6, 6)))
    batch.score_many(policies, "ab")
    prompts = batch._prefixes.rows(policies[0], slice(0, 2))
    plans = Plans(policies, [batch.shapes[i] for i in batch._order], LAYERS, 5, torch.device("cpu"))
    groups = prompts.layers[1].key.shape[1]
    pool = Pool(plans, prompts, 1, groups)
    length = prompts.layers[1].modality.shape[1]
    room = plans.room(1)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        pool.join(step)
        heads = case.model.config.get_text_config().num_attention_heads // groups
        weights = torch.rand(2, groups, 2, heads, length + 5, generator=generator)
        pool.attended(step, weights)
        held = pool.seen.sum(-1)
        assert (held == room.limit[:, None, :, step + 1]).all()
        assert pool.seen[..., max(length, length + step - 2) : length + step + 1].all()
        first = (prompts.layers[1].modality >= 0).int().argmax(dim=1)
        for row, start in enumerate(first.tolist()):
            assert pool.seen[row, :, :, start : start + 2].all()
            assert not pool.seen[row, :, :, :start].any()


def test_a_filter_leaves_later_layers_fewer_columns(case):
    policy = Policy(prefill_filter=(PrefillFilter(after_layer=1, keep=0.5),))
    inputs, answers = case.inputs(2, seed=5, pad=True, images_per_row=[1, 2]), answers_of((4, 3))
    batch = ForcedBatch(case.model, inputs, answers)
    batch.score(policy, "ab")
    key, held = next((key, held) for key, held in batch._prefixes._prompts.items() if key)
    assert key
    ids = inputs["input_ids"][batch._order]
    for index, layer in enumerate(held.layers):
        vision = (layer.modality == 1).sum(dim=1).tolist()
        shapes = [batch.shapes[i] for i in batch._order]
        assert vision == [s.vision if index < 1 else int(0.5 * s.vision + 1e-6) for s in shapes]
        real = layer.modality >= 0
        assert (ids.gather(1, layer.columns)[real & (layer.modality == 1)] == case.vision_token_ids[0]).all()
        assert (layer.columns.diff(dim=1)[real[:, 1:] & real[:, :-1]] > 0).all()
