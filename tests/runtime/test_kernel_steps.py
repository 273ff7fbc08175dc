"""Decoding steps by kernels: what they are told, and whole answers against steps without them."""

from __future__ import annotations

import pytest
import torch

import avlprof
from avlprof.attention.call import StepStates
from avlprof.attention.decode import step_attention
from avlprof.attention.session import with_cache
from avlprof.runtime import apply as apply_module
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.testing.models import random_llava, random_qwen2_5_vl
from tests.helpers import Counted, generate, thinned
from tests.interpreted import Launched, passes, runs_elsewhere, runs_here
from tests.policies import POLICIES, QUICK, SCORED

ASKED = ("attention.decode", "runtime.buffers", "runtime.eviction", "runtime.cored", "runtime.buckets")
INTERPRETED = (*("core and window", "per head", "scored core", "history", "packed text and core"),)


@pytest.fixture
def case():
    return random_llava()


def inputs_of(case):
    return case.inputs(batch=3, seed=7, pad=True, text=15, images_per_row=[1, 0, 2])


def kernels_everywhere(monkeypatch, *modules):
    """What asks whether kernels run is told so, on a CPU too."""
    for module in modules:
        monkeypatch.setattr(f"avlprof.{module}.kernels_run", lambda tensor: True)


def check_bounds(mask, bounds):
    """A mask shows what bounds say."""
    assert (mask is None) == (bounds is None)
    if bounds is not None:
        column = torch.arange(mask.shape[-1]) + bounds.start
        seen = (column >= bounds.firsts[:, None]) & (column <= bounds.lasts[:, None])
        assert torch.equal(seen[:, None, None], mask)


@pytest.mark.parametrize("name", thinned(list(POLICIES), list(POLICIES), QUICK))
def test_bounds_say_what_masks_show(case, name, monkeypatch):
    kernels_everywhere(monkeypatch, "runtime.cored", "runtime.buckets")
    attend, told = apply_module.step_attention, []

    def checked(states, sets):
        check_bounds(states.mask, states.bounds)
        told.append(states.bounds)
        return attend(states, sets)

    monkeypatch.setattr(apply_module, "step_attention", checked)
    with avlprof.apply(case.model, POLICIES[name]):
        generate(case.model, inputs_of(case))
    # steps that read what is stored in few bits go another way, which may be all of them
    assert POLICIES[name].packs or POLICIES[name].text.packs or any(bounds is not None for bounds in told)


@pytest.mark.parametrize("name", ["core and window", "score only", "newest share"])
def test_replayed_steps_keep_bounds_up_to_date(case, name, monkeypatch):
    assert name not in SCORED
    kernels_everywhere(monkeypatch, "runtime.cored", "runtime.buckets")
    with avlprof.apply(case.model, POLICIES[name], captured=6) as runtime:
        for images in ([1, 0, 2], [1, 1, 0]):  # the second prompt lies in the buffers of the first
            inputs = case.inputs(batch=3, seed=7, pad=True, text=15, images_per_row=images)
            generate(case.model, inputs)
            for layer in runtime.cache.layers:
                assert isinstance(layer, AdaptiveLayer)
                for whole in {False, layer._has_core}:
                    _, mask, bounds = layer._window(whole)
                    check_bounds(mask, bounds)


@pytest.mark.full
@runs_elsewhere
def test_answers_in_the_interpreter():
    passes(__file__, len(INTERPRETED) + 2, "-k", "kernels_answer or launches")


@runs_here
@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_answer_like_steps_without_them(name, monkeypatch):
    from avlprof.attention import triton_decode

    case = random_qwen2_5_vl()
    inputs = case.inputs(batch=2, seed=7, pad=True, text=15, images_per_row=[1, 2])
    found, run = [], triton_decode.DecodeKernels.run
    kernel_steps = []
    monkeypatch.setattr(triton_decode.DecodeKernels, "run", lambda own: kernel_steps.append(own) or run(own))
    for kernels in (False, True):
        if kernels:
            kernels_everywhere(monkeypatch, *ASKED)
            monkeypatch.setattr("avlprof.attention.decode.kernels_pay", lambda *_: True)
        with avlprof.apply(case.model, POLICIES[name]) as runtime:
            logits = torch.stack(generate(case.model, inputs, 6).logits)
        sets = [
            {tuple(sorted(part.flatten().tolist())) for part in layer.vision_positions(row)}
            for layer in runtime.cache.layers
            for row in range(2)
        ]
        found.append((logits, sets))
    packs = POLICIES[name].text.packs  # a step that reads few bits runs no kernel: of one layer four do
    assert len(kernel_steps) >= (4 if packs else 3 * 5)  # else of all layers, for tokens behind the first
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=1e-5)
    assert found[0][1] == found[1][1]


@runs_here
@pytest.mark.parametrize(("name", "refreshes"), [("core, k=1", True), ("evict", False)])
def test_a_step_takes_few_launches(case, name, refreshes, monkeypatch):
    """Two for attention, and two more at a refresh; what writes the token and its mask aside."""
    from avlprof.attention import triton_decode
    from avlprof.runtime import triton_exchange

    kernels_everywhere(monkeypatch, *ASKED)
    monkeypatch.setattr("avlprof.attention.decode.kernels_pay", lambda *_: True)
    monkeypatch.setattr(triton_decode, "_LEAST_PART", 8)  # so that there are parts to merge
    with avlprof.apply(case.model, POLICIES[name]) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        case.model(**inputs_of(case), **with_cache(case.model, cache))
        layer, kernels = cache.layers[0], []
        states = torch.randn(2, 3, 2, 1, 16)
        query = torch.randn(3, 4, 1, 16)
        for again in (False, True):  # the first refresh makes what all others use
            keys, values = layer.update(*states)
            if again:
                for module, kernel in (
                    *((triton_decode, kernel) for kernel in ("decode_parts", "decode_merge")),
                    *((triton_exchange, kernel) for kernel in ("core_choice", "exchange_pairs")),
                ):
                    monkeypatch.setattr(module, kernel, Launched(getattr(module, kernel), kernels))
            with Counted() as counted:
                step = layer.step_for(query, 0.25, None)
                given = StepStates(query, keys, values, 0.25, mask=step.mask, bounds=step.bounds)
                _, weights = step_attention(given, step.weighing)
                if weights is not None:
                    layer.after(step, weights)
    assert (weights is not None) == refreshes
    assert len(kernels) == (4 if refreshes else 2)
    assert counted.names == []
