"""KV heads that differ in how many vision tokens they keep, against the oracle and plain loops."""

from __future__ import annotations

import pytest
import torch

import avlprof
from avlprof.attention.call import AttentionCall
from avlprof.attention.codec import degraded, packed_bytes
from avlprof.attention.ranking import best_pairs
from avlprof.errors import UserError
from avlprof.policy import JointPool, Policy, live_share, sizes
from avlprof.runtime import packed as packed_module
from avlprof.runtime.buffers import RESERVE, DenseLayer
from avlprof.runtime.forced import ForcedBatch
from avlprof.runtime.packed import stored_attention
from avlprof.runtime.ragged import RaggedHeads
from avlprof.testing.models import cases, random_llava
from tests.conversations import check_beams, checked_turns
from tests.helpers import answers_of, generate, one_row, stepwise, thinned
from tests.oracle import NEAR_TIE, Oracle
from tests.policies import ADAPTIVE

MODELS = dict(cases())
QUICK = ("adaptive", "adaptive, 4 bits")


@pytest.fixture(
    scope="module", params=thinned(MODELS, ("llava-4q2kv-sinks", "qwen2_5_vl-6q2kv"), ("llava-4q2kv-sinks",))
)
def case(request):
    return MODELS[request.param]()


def held(layer, row, padding=0):
    """What each KV head holds of a row's vision, as the oracle counts positions."""
    if isinstance(layer, DenseLayer):
        return None
    kept, _ = layer.vision_positions(row)
    return [{p - padding for p in places.tolist() if p >= 0} for places in kept]


@pytest.mark.parametrize("name", thinned(ADAPTIVE, ("adaptive", "adaptive, packed text"), ("adaptive",)))
def test_rows_of_a_batch_are_those_of_the_oracle(case, name):
    policy, compared, uneven = ADAPTIVE[name], 0, 0
    for seed in range(2, 30):
        batch = case.inputs(batch=3, seed=seed, pad=True, text=15, images_per_row=[1, 0, 2])
        with avlprof.apply(case.model, policy) as runtime:
            ours = generate(case.model, batch, 8, suppress_tokens=list(case.vision_token_ids))
        width = batch["input_ids"].shape[1]
        for row in (2, 0):
            single = one_row(case, batch, row)
            answer = ours.sequences[row, width:].tolist()
            logits, trace = Oracle(case.model, policy, case.vision_token_ids).run(single, answer[:-1])
            if trace.gap < NEAR_TIE:
                continue
            compared += 1
            mine = torch.stack([step[row] for step in ours.logits])
            torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)
            padding = width - single["input_ids"].shape[1]
            for index, layer in enumerate(runtime.cache.layers):
                sets = held(layer, row, padding)
                assert sets in (None, trace.kept[index])
                uneven += sets is not None and len({len(one) for one in sets}) > 1
        if compared > 1:
            break
    assert compared > 1, "near-ties decide the sets of every seed"
    assert uneven, "no head keeps more than another"


@pytest.mark.parametrize("name", thinned(ADAPTIVE, ("adaptive, packed text",)))
def test_two_turns_are_those_of_the_oracle(case, name):
    for cache, row, padding, trace in checked_turns(case, ADAPTIVE[name], range(30, 50), 1):
        for index, layer in enumerate(cache.layers):
            assert held(layer, row, padding) in (None, trace.kept[index])


@pytest.mark.parametrize("name", thinned(ADAPTIVE, (*QUICK, "adaptive, packed text"), QUICK))
def test_forced_is_the_stepwise_runtime(case, name):
    inputs = case.inputs(batch=4, seed=21, pad=True, text=11, images_per_row=[1, 2, 0, 1])
    answers = answers_of((9, 5, 1, 7))
    ours = ForcedBatch(case.model, inputs, answers).logits(ADAPTIVE[name])
    theirs = stepwise(case.model, inputs, answers, ADAPTIVE[name])
    for row, answer in enumerate(answers):
        a, b = ours[row, : len(answer) - 1], theirs[row, : len(answer) - 1]
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_policies_of_one_pass_have_shares_of_their_own():
    """Shares of layers, floors and shares of heads differ; scores are those of each alone."""
    case = random_llava()
    inputs, answers = case.inputs(batch=2, seed=3, pad=True), answers_of((6, 4))
    even = Policy(vision_keep=0.4, heads="adaptive")
    policies = [
        even,
        Policy(vision_keep=(0.7, 0.2, 0.4), heads="adaptive", head_floor=0.6),
        Policy(vision_keep=0.4, heads="adaptive", head_floor=1.0, head_shares=((1.5, 0.5),) * 3),
    ]
    batch = ForcedBatch(case.model, inputs, answers)
    together = batch.score_many(policies, ["a", "b"])
    for policy, found in zip(policies, together, strict=True):
        alone = ForcedBatch(case.model, inputs, answers).score(policy, ["a", "b"])
        assert [one.kl for one in found] == pytest.approx([one.kl for one in alone], abs=1e-5)
    assert len({round(found[0].kl, 7) for found in together}) == 3


@pytest.mark.parametrize("name", thinned(ADAPTIVE, (*QUICK, "adaptive, packed text"), QUICK))
def test_bytes_are_those_of_the_policy_and_nothing_is_padding(case, name):
    policy = ADAPTIVE[name]
    inputs = case.inputs(batch=3, seed=4, pad=True, text=12, images_per_row=[1, 0, 2])
    with avlprof.apply(case.model, policy) as runtime, torch.no_grad():
        case.model(**inputs, use_cache=True)
    cache, uneven = runtime.cache, 0
    shapes = [avlprof.policy.PromptShape(r.system, r.vision, r.text, group=16) for r in cache.rows]
    for use, layer in zip(cache.use(), cache.layers, strict=True):
        each = [sizes(policy, shape, 3)[use.layer] for shape in shapes]
        assert use.live == use.prompt == sum(size.live for size in each) * layer.bytes_per_token()
        kv_heads, size = layer.keys.shape[1], layer.keys.shape[3]
        number = packed_bytes(size, layer.bits) if layer.bits < 16 else 4 * size  # the model runs in fp32
        tokens = kv_heads * sum(size.vision for size in each)
        assert layer.stored.allocated_bytes() == tokens * (2 * number + 8)
        beside = max(r.system for r in cache.rows) + max(r.text for r in cache.rows) + RESERVE
        assert layer.keys.shape[2] <= beside, "vision lies nowhere else"
        uneven += len({*sum(layer.stored.lengths, ())}) > 1
    assert uneven
    assert sum(u.live for u in cache.use()) / sum(u.dense_prompt for u in cache.use()) == pytest.approx(
        live_share(policy, shapes, 3)
    )


def test_a_floor_of_one_is_one_count_for_all_heads():
    case = random_llava()
    inputs = case.inputs(batch=2, seed=5, pad=True)
    found = []
    for heads, floor in (("adaptive", {"head_floor": 1.0}), ("kv_head", {})):
        with avlprof.apply(case.model, Policy(vision_keep=(0.6, 0.3, 0.45), heads=heads, **floor)) as runtime:
            out = generate(case.model, inputs, 6)
        sets = [held(layer, row) for layer in runtime.cache.layers for row in range(2)]
        found.append((torch.stack(out.logits), [[sorted(one) for one in two] for two in sets]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1] == found[1][1]


def test_beams_take_their_heads_with_them():
    check_beams(random_llava(), ADAPTIVE["adaptive, 4 bits"], 8, 2)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(vision_keep=0.5, vision_compute=0.2, heads="adaptive"), "beside vision_compute"),
        (Policy(pool="joint", joint=JointPool(keep=0.3), heads="adaptive"), "beside pool: joint"),
        (
            Policy(vision_keep=0.5, heads="adaptive", head_shares=((1.0, 0.5, 1.5),) * 3),
            "3 KV heads, layer 0 has 2",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(policy, said):
    case = random_llava()
    inputs = case.inputs()
    with pytest.raises(UserError, match=said), avlprof.apply(case.model, policy):
        generate(case.model, inputs, 2)
    with pytest.raises(UserError, match=said):
        ForcedBatch(case.model, inputs, answers_of((3,))).logits(policy)


def test_steps_cannot_be_captured():
    case = random_llava()
    with pytest.raises(UserError, match="leave captured out"):
        with avlprof.apply(case.model, ADAPTIVE["adaptive"], captured=4):
            pass


@pytest.mark.parametrize("parts", [(0.0, 0.0, 0.0), (0.2, 0.2, 0.2), (2.0, 0.25, 0.75), (1.0, 1.0, 1.0)])
def test_pairs_are_the_best_with_ties_to_the_lower_column(parts):
    """Against sorts in plain Python; scores of few values, so that most of them tie."""
    generator = torch.Generator().manual_seed(len(set(parts)))
    scores = torch.randint(0, 4, (4, 3, 17), generator=generator).float()
    candidates = torch.rand(4, 1, 17, generator=generator) < 0.8
    counts = [0, 3, 7, 17]
    found = best_pairs(scores, candidates, torch.tensor(counts), parts)
    for row, count in enumerate(counts):
        columns = [c for c in range(17) if candidates[row, 0, c]]
        wanted = set()
        for head, part in enumerate(parts):
            ranked = sorted(columns, key=lambda c: (-scores[row, head, c], c))
            wanted |= {(head, c) for c in ranked[: int(part * count + 1e-6)]}
        rest = [(h, c) for c in columns for h in range(3) if (h, c) not in wanted]
        rest.sort(key=lambda pair: (-scores[row, pair[0], pair[1]], pair[1], pair[0]))
        wanted |= set(rest[: 3 * count - len(wanted)])
        assert {tuple(pair) for pair in found[row].nonzero().tolist()} == wanted


def drawn(bits, seed=1):
    """Three rows of two heads that hold 0 to 9 of 11 tokens, and the plain numbers."""
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(3, 2, 11, 32, generator=generator) for _ in range(2))
    positions = torch.stack([torch.randperm(90, generator=generator)[:11] for _ in range(6)]).view(3, 2, 11)
    kept = torch.zeros(3, 2, 11, dtype=torch.bool)
    for pair, count in enumerate((4, 9, 0, 6, 7, 1)):
        kept[pair // 2, pair % 2, torch.randperm(11, generator=generator)[:count]] = True
    return RaggedHeads.of(key, value, positions, kept, None, bits), key, value, positions, kept


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("bits", [16, 4, 3])
def test_a_step_attends_to_each_heads_own_tokens(softcap, sinks, bits, monkeypatch):
    """In blocks of three tokens where there are few bits, against fp64 attention."""
    monkeypatch.setattr(packed_module, "_NUMBERS", 1)
    monkeypatch.setattr(packed_module, "_LEAST", 3)
    stored, keys, values, _, kept = drawn(bits)
    keys, values = (t if bits == 16 else degraded(t, bits) for t in (keys, values))
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(3, n, m, 32, generator=generator) for n, m in ((6, 1), (2, 5), (2, 5)))
    mask = torch.rand(3, 1, 1, 5, generator=generator) < 0.8
    options = {"s_aux": torch.randn(6, generator=generator)} if sinks else {}
    call = AttentionCall(0, None, query, key, value, None, 0.3, softcap, None, options, None, mask)
    out, weights = stored_attention([stored], call, mask)
    for row in range(3):
        for head in range(6):
            mine, seen = kept[row, head // 3], mask[row, 0, 0]
            k = torch.cat([keys[row, head // 3, mine], key[row, head // 3, seen]]).double()
            v = torch.cat([values[row, head // 3, mine], value[row, head // 3, seen]]).double()
            logits = k @ query[row, head, 0].double() * 0.3
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            powers = logits.exp()
            share = powers / (powers.sum() + (options["s_aux"][head].double().exp() if sinks else 0.0))
            torch.testing.assert_close(out[row, 0, head].double(), share @ v, atol=1e-5, rtol=1e-5)
            own = weights[row, head, stored.width - int(mine.sum()) : stored.width]
            torch.testing.assert_close(own.double(), share[: int(mine.sum())], atol=1e-6, rtol=1e-5)
            assert not weights[row, head, : stored.width - int(mine.sum())].any()


@pytest.mark.parametrize("bits", [16, 3])
def test_rows_and_turns_move_tokens_as_they_are(bits):
    """In half precision, where codes would change if they were quantised again."""
    stored, _, _, positions, kept = drawn(bits)
    half = RaggedHeads(stored.keys, stored.values, stored.places, stored.lengths, torch.bfloat16)
    if bits == 16:
        half = RaggedHeads(
            stored.keys.bfloat16(), stored.values.bfloat16(), stored.places, stored.lengths, torch.bfloat16
        )
    for row in range(3):
        for head in range(2):
            assert half.positions[row, head].tolist()[half.width - int(kept[row, head].sum()) :] == (
                positions[row, head][kept[row, head]].tolist()
            )
    before = half.decoded()[0]
    generator = torch.Generator().manual_seed(9)
    new = torch.randn(3, 2, 4, 32, generator=generator).bfloat16()
    stays = torch.rand(3, 2, 4, generator=generator) < 0.5
    whole = torch.cat([before, new], dim=2)
    places = torch.cat([half.positions, torch.arange(100, 104).expand(3, 2, -1)], dim=-1)
    both = torch.cat([half.classes > 0, stays], dim=-1)
    after = RaggedHeads.of(whole, whole, places, both, half, bits)
    fresh = new if bits == 16 else degraded(new, bits)
    rows = torch.tensor([2, 0, 0, 1])
    for held, order in ((after, range(3)), (after.select_rows(rows), rows.tolist())):
        shown = held.decoded()[0]
        assert held.counts == tuple(sum(held.lengths[at]) // 2 for at in range(len(held.lengths)))
        for at, row in enumerate(order):
            for head in range(2):
                old = before[row, head][half.classes[row, head] > 0]
                wanted = torch.cat([old, fresh[row, head][stays[row, head]]])
                assert torch.equal(shown[at, head, held.width - len(wanted) :], wanted)
                assert held.lengths[at][head] == len(wanted)
