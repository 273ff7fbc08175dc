"""Refreshes that steps trigger, and layers that follow others: what they read, estimate and refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import avlprof
from avlprof.errors import UserError
from avlprof.policy import Policy, read_share, sizes
from avlprof.runtime.forced import ForcedBatch
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.runtime.trigger import Held, leaning
from avlprof.testing.families import random_gemma3
from avlprof.testing.models import random_llava
from tests.helpers import answers_of, generate, stepwise
from tests.policies import CORE, KEEP, POLICIES

STEPS = 14
FOLLOWED = Policy(
    vision_keep=KEEP, vision_compute=CORE, refresh_interval=3, refresh="score_only", refresh_layers=(1,)
)
TRIGGERED = FOLLOWED.model_copy(update={"refresh": "triggered", "refresh_layers": None})


def used(policy):
    """What three prompts of different pictures use, their shapes, and the layers."""
    case = random_llava()
    inputs = case.inputs(batch=3, seed=8, pad=True, text=12, images_per_row=[1, 2, 1])
    with avlprof.apply(case.model, policy) as runtime:
        generate(case.model, inputs, steps=STEPS + 1)
    return runtime.cache.use(), runtime.cache.rows, runtime.cache.layers


@pytest.mark.parametrize("policy", [FOLLOWED, FOLLOWED.model_copy(update={"vision_bits": 4})])
def test_a_layer_that_follows_reads_its_core_alone(policy):
    use, rows, layers = used(policy)
    read = sum(one.read for one in use) / sum(one.dense_prompt for one in use)
    rows = [replace(row, group=16) for row in rows]
    assert read == pytest.approx(read_share(policy, rows, len(layers), STEPS))
    assert [one.refreshes for one in use] == [0, 4, 4]  # the first has nobody before it
    alone = read_share(policy.model_copy(update={"refresh_layers": None}), rows, len(layers), STEPS)
    assert alone > read_share(policy, rows, len(layers), STEPS)


def test_triggered_reads_are_what_was_triggered():
    use, rows, layers = used(TRIGGERED.model_copy(update={"refresh_margin": 0.03}))
    rates = [one.refreshes / one.steps for one in use]
    assert min(rates) > 1 / STEPS and max(rates) < (1 + (STEPS - 1) // 3) / STEPS + 1e-9
    for one, layer in zip(use, layers, strict=True):
        tokens = [sizes(TRIGGERED, row, len(layers))[one.layer] for row in rows]
        usual = sum(size.reads for size in tokens)
        most = usual + (1 + (STEPS - 1) // 3) / STEPS * 0.5 * sum(size.live - size.reads for size in tokens)
        assert usual < one.read / layer.bytes_per_token() <= most


def test_triggered_reads_of_one_prompt_are_exact():
    """Every refresh reads the keys of all that is kept beside the core: half of it."""
    case, policy = random_llava(), TRIGGERED.model_copy(update={"refresh_margin": 0.03})
    with avlprof.apply(case.model, policy) as runtime:
        generate(case.model, case.inputs(batch=1, seed=8, text=12, images_per_row=2), steps=STEPS + 1)
    use, row, layers = runtime.cache.use(), runtime.cache.rows[0], runtime.cache.layers
    for one, layer in zip(use, layers, strict=True):
        size = sizes(policy, row, len(layers))[one.layer]
        read = size.reads + one.refreshes / one.steps * 0.5 * (size.live - size.reads)
        assert one.read / layer.bytes_per_token() == pytest.approx(read)
    assert sum(one.refreshes for one in use) > len(use)


def test_what_is_known_of_a_core_is_counted_as_allocated():
    layer = used(TRIGGERED)[2][1]
    known = layer.held.allocated_bytes()
    assert known == sum(
        part.untyped_storage().nbytes()
        for part in (layer.held.apart, layer.held.odds, layer.held.mass, layer.held.share)
    )
    whole = layer.allocated_bytes()
    layer.forget_core()
    assert whole - layer.allocated_bytes() == known > 0


@pytest.mark.parametrize("name", ["triggered", "triggered and followed", "packed triggered"])
def test_forced_steps_refresh_when_generated_ones_do(name):
    case, policy = random_llava(), POLICIES[name].model_copy(update={"refresh_margin": 0.03})
    for seed in range(3):
        inputs = case.inputs(batch=1, seed=seed, text=12, images_per_row=2)
        with avlprof.apply(case.model, policy) as runtime:
            said = generate(case.model, inputs, suppress_tokens=list(case.vision_token_ids))
        answer = said.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        counted = ForcedBatch(case.model, inputs, [answer]).refreshes(policy)
        leads = policy.refresh_layers or range(3)
        found = [one.refreshes for one in runtime.cache.use() if one.layer in leads]
        assert [counted[layer] for layer in leads] == found
        assert len(set(found)) > 1 or max(found) < len(answer) - 1


def test_at_most_so_many_refreshes_can_be_triggered():
    """As many as there can be are counted, unless it is known how many there were."""
    rows = used(TRIGGERED)[1]
    rates = None, (1.0, 1.0, 1.0), (0.2, 0.1, 0.2), (0.0, 0.0, 0.0)
    shares = [read_share(TRIGGERED, rows, 3, STEPS, refreshed) for refreshed in rates]
    assert shares[0] == shares[1] > shares[2] > shares[3]
    assert shares[3] == read_share(TRIGGERED.model_copy(update={"refresh_interval": 0}), rows, 3, STEPS)


def test_all_layers_leading_is_no_layer_following():
    case = random_llava()
    inputs = case.inputs(batch=2, seed=3, pad=True, text=12, images_per_row=[2, 1])
    answers = answers_of((9, 13))
    for policy in (FOLLOWED, TRIGGERED):
        found = []
        for leads in (None, (0, 1, 2)):
            named = policy.model_copy(update={"refresh_layers": leads})
            found += [ForcedBatch(case.model, inputs, answers).logits(named)[:, :8]]
            found += [stepwise(case.model, inputs, answers, named)[:, :8]]
        for one in found[1:]:
            torch.testing.assert_close(one, found[0], atol=1e-4, rtol=1e-4)


def test_a_core_that_cannot_fall_so_far_is_picked_once():
    use, _, layers = used(TRIGGERED.model_copy(update={"refresh_margin": 1.0}))
    assert [one.refreshes for one in use] == [1, 1, 1]
    assert all(isinstance(layer, AdaptiveLayer) and layer.held is not None for layer in layers)


def test_what_a_core_holds_is_exact_where_keys_of_each_part_are_alike():
    """Then the mean key of a part says all of it: against the softmax over all keys."""
    draw = torch.Generator().manual_seed(4)
    rows, groups, size, scaling = 3, 2, 8, 0.4
    query, later = (torch.randn(rows, groups, 4, size, generator=draw) for _ in range(2))
    core, rest = (torch.randn(rows, groups, 1, size, generator=draw) for _ in range(2))
    keys = torch.cat([core.expand(-1, -1, 5, -1), rest.expand(-1, -1, 11, -1)], dim=2)

    def masses(states):
        weights = (states.double() @ keys.double().mT * scaling).softmax(dim=-1)
        return weights[..., :5].sum(dim=-1), weights[..., 5:].sum(dim=-1)

    apart = (rest - core).squeeze(2)
    held = Held.of(*masses(query), apart, leaning(query, apart, scaling))
    torch.testing.assert_close(held.share.float(), masses(query)[0].mean(dim=(1, 2)).float())
    torch.testing.assert_close(held.estimate(leaning(query, apart, scaling)).float(), held.share.float())
    found = held.estimate(leaning(later, apart, scaling))
    torch.testing.assert_close(found.float(), masses(later)[0].mean(dim=(1, 2)).float(), atol=1e-6, rtol=1e-5)
    fallen = held.fallen(leaning(later, apart, scaling), 0.05)
    assert fallen.tolist() == (held.share - masses(later)[0].mean(dim=(1, 2)) >= 0.05).tolist()
    mixed = held.replaced(
        Held.of(*masses(later), apart, leaning(later, apart, scaling)), torch.arange(3) == 1
    )
    torch.testing.assert_close(
        mixed.share.float(), torch.stack([held.share[0], found[1], held.share[2]]).float()
    )


def test_a_layer_with_a_window_cannot_lead():
    case = random_gemma3()
    kinds = case.model.config.get_text_config().layer_types
    window, full = kinds.index("sliding_attention"), kinds.index("full_attention")
    inputs, answers = case.inputs(seed=1), answers_of((6,))
    policy = Policy(vision_keep=0.5, vision_compute=0.2, refresh_interval=2, refresh="score_only")
    wrong = policy.model_copy(update={"refresh_layers": (window,)})
    right = policy.model_copy(update={"refresh_layers": (full,)})
    assert window < full
    for work in (
        lambda: generate(case.model, inputs),
        lambda: ForcedBatch(case.model, inputs, answers).logits(wrong),
    ):
        with (
            pytest.raises(UserError, match=f"names layer {window}, which keeps a window"),
            avlprof.apply(case.model, wrong),
        ):
            work()
    ours = ForcedBatch(case.model, inputs, answers).logits(right)
    torch.testing.assert_close(
        ours[:, :5], stepwise(case.model, inputs, answers, right)[:, :5], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(UserError, match="refresh_layers must be below the model's"):
        policy.model_copy(update={"refresh_layers": (0, 99)}).check_layers(len(kinds))
