"""Stored vision in few bits: how it is swapped, read and shown, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import avlprof
from avlprof.attention.call import AttentionCall
from avlprof.attention.codec import decode, degraded, encode
from avlprof.attention.session import switched, with_cache
from avlprof.policy import Policy, TextPolicy
from avlprof.runtime import packed as packed_module
from avlprof.runtime.packed import StoredBits, stored_attention, with_stored
from avlprof.testing.models import cases, random_llava
from tests.conversations import check_beams
from tests.helpers import generate
from tests.policies import PACKED

MODELS = dict(cases())
ROWS, HEADS, SLOTS, CORE, SIZE = 3, 2, 11, 6, 32


def drawn(seed, bits, counts, groups=1):
    """A stored part with its plain values, and buffers of a core behind two slots of something else."""
    generator = torch.Generator().manual_seed(seed)
    total = SLOTS + CORE + 2
    key, value = (torch.randn(ROWS, HEADS, total, SIZE, generator=generator) for _ in range(2))
    positions = torch.stack([torch.randperm(500, generator=generator)[:total] for _ in range(ROWS)])
    positions = positions[:, None].expand(-1, groups, -1).contiguous()
    order = torch.arange(SLOTS).expand(ROWS, groups, -1)
    stored = StoredBits.of(key, value, positions, order, counts, None, bits)
    return stored, tuple(part[:, :, SLOTS:].clone() for part in (key, value, positions))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("groups", [1, HEADS])
def test_a_swap_decodes_what_enters_and_quantises_what_leaves(bits, groups):
    counts = [SLOTS, 7, SLOTS]
    stored, buffers = drawn(bits, bits, counts, groups)
    before = [part.clone() for part in (*stored.parts, *buffers)]
    inside = [decode(part) for part in (stored.keys, stored.values)]
    generator = torch.Generator().manual_seed(groups)
    old = torch.zeros(ROWS, 1, SLOTS + CORE, dtype=torch.bool)
    old[:, :, SLOTS:] = True
    new, swapped = old.expand(-1, groups, -1).clone(), {}
    for row, count in enumerate(counts):
        for group in range(groups):
            many = (3, 2, 0)[row]
            leaves = sorted(torch.randperm(CORE, generator=generator)[:many].tolist())
            enters = sorted((SLOTS - count + torch.randperm(count, generator=generator)[:many]).tolist())
            new[row, group, [SLOTS + slot for slot in leaves]] = False
            new[row, group, enters] = True
            swapped[row, group] = list(zip(leaves, enters, strict=True))
    stored.exchange(old, new, buffers, 4)
    wanted = [part.clone() for part in before[7:]]
    positions = before[6].clone()
    after = [part.clone() for part in inside]
    for (row, group), pairs in swapped.items():
        for head in range(HEADS) if groups == 1 else [group]:
            for core, slot in pairs:
                for states, mine, held in zip(wanted[:2], after, inside, strict=True):
                    mine[row, head, slot] = degraded(states[row, head, core], bits)
                    states[row, head, core] = held[row, head, slot]
        for core, slot in pairs:
            at = wanted[2][row, group, core].clone()
            wanted[2][row, group, core] = positions[row, group, slot]
            positions[row, group, slot] = at
    for mine, theirs in zip(buffers, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(decode(stored.keys), after[0])
    assert torch.equal(decode(stored.values), after[1])
    assert torch.equal(stored.positions, positions)
    for now, was in zip((*stored.parts, *buffers), before, strict=True):
        assert torch.equal(now[2], was[2]), "a row without swaps is as it was, bit by bit"


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("counts", [[SLOTS] * 3, [SLOTS, 5, 0]])
def test_a_step_attends_to_both_parts(softcap, sinks, counts, monkeypatch):
    """In blocks of three slots, against fp64 attention to the decoded whole."""
    monkeypatch.setattr(packed_module, "_NUMBERS", 1)
    monkeypatch.setattr(packed_module, "_LEAST", 3)
    stored, (key, value, positions) = drawn(1, 4, counts)
    query = torch.randn(ROWS, 4, 1, SIZE, generator=torch.Generator().manual_seed(5))
    mask = torch.rand(ROWS, 1, 1, key.shape[2], generator=torch.Generator().manual_seed(6)) < 0.7
    options = {"s_aux": torch.randn(4)} if sinks else {}
    call = AttentionCall(0, None, query, key, value, None, 0.3, softcap, None, options, positions, mask)
    out, weights = stored_attention([stored], call, mask)
    keys = torch.cat([decode(stored.keys), key], dim=2).double()
    values = torch.cat([decode(stored.values), value], dim=2).double()
    for row in range(ROWS):
        seen = [slot for slot in range(SLOTS) if slot >= SLOTS - counts[row]]
        seen += [SLOTS + slot for slot in range(key.shape[2]) if mask[row, 0, 0, slot]]
        for head in range(4):
            logits = keys[row, head // 2, seen] @ query[row, head, 0].double() * 0.3
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            powers = logits.exp()
            share = powers / (powers.sum() + (options["s_aux"][head].double().exp() if sinks else 0.0))
            wanted = torch.zeros(keys.shape[2], dtype=torch.double)
            wanted[seen] = share
            torch.testing.assert_close(weights[row, head].double(), wanted, atol=1e-6, rtol=1e-5)
            mixed = share @ values[row, head // 2, seen]
            torch.testing.assert_close(out[row, 0, head].double(), mixed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "counts", [([SLOTS] * 3, [SLOTS] * 3), ([2, SLOTS, 5], [SLOTS] * 3), ([0, 3, 9],) * 2]
)
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_other_bits_are_one_softmax(counts, masked):
    """Against fp64 attention to both decoded parts and the buffers; observers are shown these."""
    parts = [drawn(seed, bits, own)[0] for seed, bits, own in zip((1, 2), (3, 8), counts, strict=True)]
    key, value, positions = drawn(3, 4, [SLOTS] * 3)[1]
    query = torch.randn(ROWS, 4, 1, SIZE, generator=torch.Generator().manual_seed(5))
    mask = torch.rand(ROWS, 1, 1, key.shape[2], generator=torch.Generator().manual_seed(6)) < 0.7
    mask = mask if masked else None
    call = AttentionCall(0, None, query, key, value, None, 0.3, None, None, {}, positions, mask)
    out, weights = stored_attention(parts, call, mask)
    shown = with_stored(parts, call)
    seen = torch.ones(ROWS, 2 * SLOTS + key.shape[2], dtype=torch.bool)
    for row in range(ROWS):
        seen[row, : SLOTS - counts[0][row]] = seen[row, SLOTS : 2 * SLOTS - counts[1][row]] = False
    if masked:
        seen[:, 2 * SLOTS :] = mask[:, 0, 0]
    keys = torch.cat([*(decode(part.keys) for part in parts), key], dim=2)
    values = torch.cat([*(decode(part.values) for part in parts), value], dim=2)
    assert torch.equal(shown.key, keys)
    assert torch.equal(shown.value, values)
    assert shown.positions.tolist() == torch.cat([*(p.positions for p in parts), positions], -1).tolist()
    assert (
        bool(seen.all())
        if shown.valid is None
        else torch.equal(shown.valid.expand(ROWS, 1, 1, -1)[:, 0, 0], seen)
    )
    keys, values = (states.repeat_interleave(2, dim=1).double() for states in (keys, values))
    logits = (query.double() @ keys.mT * 0.3).masked_fill(~seen[:, None, None], -torch.inf)
    torch.testing.assert_close(weights.double(), logits.softmax(-1)[:, :, 0], atol=1e-6, rtol=1e-5)
    mixed = (logits.softmax(-1) @ values)[:, :, 0]
    torch.testing.assert_close(out[:, 0].double(), mixed, atol=1e-5, rtol=1e-5)


def test_text_in_few_bits_stays_so_and_what_is_generated_stays_full():
    """Quantised once, from what the prompt's layers gave; the buffers hold the core and generated tokens."""
    case, seen = random_llava(), Seen()
    policy = Policy(vision_keep=0.5, vision_compute=0.25, text=TextPolicy(bits=(4, 16, 2)))
    inputs = case.inputs(batch=2, seed=4, pad=True, text=9)
    with avlprof.apply(case.model, policy) as runtime, switched(case.model, observers=(seen,)):
        cache = runtime.new_cache()
        generate(case.model, inputs, 8, **with_cache(case.model, cache))
    first, *steps = seen.steps
    for (index, whole, _), bits in zip(first, (4, 16, 2), strict=True):
        layer, shapes = cache.layers[index], cache.rows
        texts = [shape.system + shape.text for shape in shapes]
        assert (layer.words is None) == (bits == 16)
        if layer.words is None:
            continue
        assert list(layer.words.counts) == texts
        assert layer.text.counts == [7, 7]
        for row, count in enumerate(texts):
            places = layer.words.positions[row, 0, layer.words.width - count :]
            wanted = degraded(whole[row][:, places], bits)
            for calls in steps:
                shown = calls[index][1][row, :, layer.words.width - count : layer.words.width]
                assert torch.equal(shown, wanted)


def test_what_a_turn_holds_moves_as_it_is():
    """Codes of held tokens are not quantised again, in half precision either; new ones are."""
    stored, _ = drawn(2, 3, [SLOTS] * 3)
    key = torch.cat(
        [decode(stored.keys, torch.bfloat16), torch.randn(ROWS, HEADS, 4, SIZE).bfloat16()], dim=2
    )
    order = torch.tensor([8, 2, 13, 0, 12]).expand(ROWS, 1, -1)
    positions = torch.arange(15).expand(ROWS, 1, -1)
    again = StoredBits.of(key, key, positions, order, [5] * 3, stored, 3)
    for slot, source in enumerate((8, 2, None, 0, None)):
        for now, was in zip(again.keys.parts, stored.keys.parts, strict=True):
            if source is not None:
                assert torch.equal(now[:, :, slot], was[:, :, source])
    fresh = encode(key[:, :, [13, 12]], 3)
    for now, new in zip(again.keys.parts, fresh.parts, strict=True):
        assert torch.equal(now[:, :, [2, 4]], new)


class Largest(TorchDispatchMode):
    """The largest tensor of floats that an operator made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, torch.Tensor) and part.is_floating_point() and part.ndim >= 4:
                self.most = max(self.most, part.numel())
        return out


def test_no_step_makes_a_whole_copy():
    stored, (key, value, positions) = drawn(3, 2, [SLOTS] * 3)
    many = torch.arange(SLOTS).repeat(200).expand(ROWS, 1, -1)
    stored = StoredBits.of(
        *stored.decoded(), stored.positions, many, [many.shape[-1]] * ROWS, stored, stored.keys.bits
    )
    query = torch.randn(ROWS, 4, 1, SIZE)
    call = AttentionCall(0, None, query, key, value, None, 0.3, None, None, {}, positions)
    with Largest() as seen:
        stored_attention([stored], call, None)
    assert seen.most <= packed_module._NUMBERS < ROWS * HEADS * many.shape[-1] * SIZE


@pytest.mark.parametrize("name", ["packed core", pytest.param("packed text", marks=pytest.mark.full)])
def test_beams_take_their_stored_part_with_them(name):
    check_beams(MODELS["llava-4q2kv-sinks"](), PACKED[name], 12, 3)


class Seen:
    """Keeps the calls of each step."""

    def __init__(self):
        self.steps = []

    def begin(self, forward):
        self.steps.append([])

    def attended(self, forward, call):
        self.steps[-1].append((call.layer, call.key.clone(), call.positions))


@pytest.mark.parametrize("name", ["packed", "packed core"])
def test_observers_are_shown_what_was_attended_to(name):
    """Decoded, with their positions; and nothing changes because somebody looks."""
    case, policy, seen = random_llava(), PACKED[name], Seen()
    inputs = case.inputs(batch=2, seed=4, pad=True, text=9)
    with avlprof.apply(case.model, policy):
        alone = generate(case.model, inputs, 8)
    with avlprof.apply(case.model, policy) as runtime, switched(case.model, observers=(seen,)):
        cache = runtime.new_cache()
        watched = generate(case.model, inputs, 8, **with_cache(case.model, cache))
    assert all(torch.equal(a, b) for a, b in zip(alone.logits, watched.logits, strict=True))
    every = policy.refresh_interval
    for step, calls in enumerate(seen.steps[1:], 1):
        for layer, key, positions in calls:
            own = cache.layers[layer]
            reads = policy.vision_compute is None or step % every == 0
            vision = max(plan.vision if reads else plan.core for plan in own.plans)
            most = max(plan.system for plan in own.plans) + vision + max(own.text.counts)
            assert positions.shape[-1] == key.shape[2]
            assert key.shape[2] <= most
            if reads:
                stored = own.stored.positions.shape[-1]
                assert key.shape[2] > stored
                if policy.vision_compute is None:
                    shown = key[:, :, :stored]
                    assert torch.equal(shown, decode(own.stored.keys))


def test_half_precision_runs_and_is_near():
    case = MODELS["qwen2_5_vl-6q2kv"]()
    inputs = case.inputs(batch=2, seed=4, pad=True)
    policy = Policy(vision_keep=0.6, vision_compute=0.2, refresh_interval=2, vision_bits=4)
    with avlprof.apply(case.model, policy):
        full = generate(case.model, inputs, 6)
    case.model.to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    with avlprof.apply(case.model, policy) as runtime:
        half = generate(case.model, inputs, 6)
    assert (half.logits[0].float() - full.logits[0]).abs().max() < 0.25
    for use, layer in zip(runtime.cache.use(), runtime.cache.layers, strict=True):
        held = sum(part.numel() * part.element_size() for part in layer.stored.parts)
        assert use.allocated >= held
        assert layer.stored.decoded()[0].dtype == torch.bfloat16
