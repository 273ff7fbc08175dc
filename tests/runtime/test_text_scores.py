"""Text that stays for its score: A-VL as its paper has it, step by step, and what the scores are."""

from __future__ import annotations

import pytest
import torch

import avlprof
from avlprof.attention.ranking import (
    KINDS,
    prompt_scores,
    quantile,
    step_scores,
)
from avlprof.attention.session import cache_of, with_cache
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.testing.models import random_llava
from tests.helpers import few, thinned
from tests.oracle import Oracle
from tests.policies import A_VL

STEPS = 66
NEAR_TIE = 1e-6
MODELS = {
    "multi-head": lambda: random_llava(1, heads=3, kv_heads=3, grid=4),
    "grouped": lambda: random_llava(2, heads=4, kv_heads=2, grid=4),
}


@pytest.fixture(scope="module", params=few(MODELS, 1))
def case(request):
    return MODELS[request.param]()


@torch.inference_mode()
def stepwise(case, policy, inputs):
    """Greedy ids, logits, and after each forward the core and text sets of every layer."""
    with avlprof.apply(case.model, policy) as runtime:
        cache = runtime.new_cache()
        out = case.model(**inputs, **with_cache(case.model, cache))
        logits, ids, cores, texts = [], [], [], []
        for _ in range(STEPS + 1):
            cores.append([sets(layer.vision_positions(0)[1]) for layer in cache.layers])
            texts.append([sets(layer.text_positions(0)) for layer in cache.layers])
            logits.append(out.logits[0, -1])
            row = logits[-1].clone()
            row[list(case.vision_token_ids)] = -torch.inf
            ids.append(int(row.argmax()))
            out = case.model(input_ids=torch.tensor([[ids[-1]]]), **with_cache(case.model, cache))
    return ids, torch.stack(logits), cores, texts, cache


def sets(positions):
    return [set(row.tolist()) for row in positions]


@pytest.mark.parametrize("name", thinned(A_VL, ("paper/a-vl", "small minimum")))
def test_a_vl_step_by_step(case, name):
    policy = A_VL[name]
    for seed in range(3, 12):
        inputs = case.inputs(seed=seed, text=25, images_per_row=2)
        ids, logits, cores, texts, cache = stepwise(case, policy, inputs)
        wanted, trace = Oracle(case.model, policy, case.vision_token_ids).run(inputs, ids[:-1])
        if trace.gap > NEAR_TIE:
            break
    assert trace.gap > NEAR_TIE, "near-ties decide the sets of every seed"
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    wanted[:, list(case.vision_token_ids)] = -torch.inf
    margin = wanted.topk(2).values.diff(dim=-1).abs()[:, 0]
    same = wanted.argmax(dim=-1) == torch.tensor(ids)
    assert bool((same | (margin < 1e-3)).all())
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, AdaptiveLayer)
        assert sets(layer.vision_positions(0)[0]) == trace.kept[index]
        for step in range(STEPS + 1):
            assert cores[step][index] == trace.cores[index][step], step
            assert texts[step][index] == trace.text[index][step], step
    heads = case.model.config.get_text_config().num_key_value_heads
    last = trace.text[0][-1]
    assert len(last) == heads
    if policy.text.minimum < 20:
        assert any(held != last[0] for texts_of in trace.text.values() for held in texts_of[-1])


def test_the_chunked_prompt_scores_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 13, 13, generator=generator).tril()
    for kind in KINDS:
        whole = prompt_scores(kind, weights, 0.4)
        parts = [prompt_scores(kind, weights[:, :, a:b], 0.4, a) for a, b in ((0, 5), (5, 6), (6, 13))]
        found = parts[-1] if kind == "last_query" else sum(parts)
        torch.testing.assert_close(found, whole)


def test_prompt_scores_are_steps_one_by_one():
    """A prompt's rows but the diagonal's part of the quantile are decoding rows; plain loops."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(9, 9, generator=generator).tril()
    history, accumulated = [0.0] * 9, [0.0] * 9
    for t in range(9):
        q = float(torch.quantile(weights[t, :t], 0.7)) if t else 0.0
        for j in range(t):
            history[j] += float(weights[t, j]) - q
            accumulated[j] += float(weights[t, j])
        history[t] += float(weights[t, t])
        accumulated[t] += float(weights[t, t])
    torch.testing.assert_close(prompt_scores("history", weights, 0.7), torch.tensor(history))
    torch.testing.assert_close(prompt_scores("accumulated", weights, 0.7), torch.tensor(accumulated))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_scores_what_is_present(kind):
    generator = torch.Generator().manual_seed(2)
    row, held = torch.rand(2, 8, generator=generator), torch.rand(2, 8, generator=generator)
    present = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])
    newest = torch.tensor([[False] * 5 + [True] + [False] * 2, [False] * 7 + [True]])
    found = step_scores(kind, held, row, present, newest, 0.3)
    for b, count in enumerate((6, 8)):
        q = float(torch.quantile(row[b, :count], 0.3)) if kind == "history" else 0.0
        for j in range(count):
            before = 0.0 if j == count - 1 or kind == "last_query" else float(held[b, j])
            less = 0.0 if j == count - 1 else q
            assert float(found[b, j]) == pytest.approx(before + float(row[b, j]) - less, abs=1e-6)


def test_quantiles_are_those_of_the_present():
    generator = torch.Generator().manual_seed(3)
    values, present = torch.rand(40, 9, generator=generator), torch.rand(40, 9, generator=generator) < 0.6
    found = quantile(values, present, 0.37)[:, 0]
    wanted = [
        float(torch.quantile(v[p], 0.37)) if p.any() else 0.0 for v, p in zip(values, present, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_scored_text_is_counted_by_head():
    """What is left of the prompt is read off the slots, and reads are the sum over the steps."""
    case = MODELS["grouped"]()
    inputs = case.inputs(seed=4, text=21, batch=2, pad=True)
    policy = A_VL["small minimum"]
    prompt = inputs["input_ids"].shape[1]
    left = []
    with avlprof.apply(case.model, policy) as runtime, torch.inference_mode():
        out = case.model(**inputs, use_cache=True)
        cache = cache_of(out)
        mask = inputs["attention_mask"]
        for _ in range(30):
            held = [given(layer, row, prompt) for layer in cache.layers for row in range(2)]
            left.append(sum(held))
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            case.model(
                input_ids=torch.full((2, 1), 9),
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                **with_cache(case.model, cache),
            )
    size = cache.layers[0].bytes_per_token()
    use = runtime.cache.use()
    now = sum(given(layer, row, prompt) for layer in cache.layers for row in range(2))
    vision = sum(p.system + p.vision for layer in cache.layers for p in layer.plans)
    assert sum(u.prompt for u in use) == pytest.approx((now + vision) * size)
    every = policy.refresh_interval
    read = 0.0
    for step, text in enumerate(left, 1):
        plans = [p for layer in cache.layers for p in layer.plans]
        read += text + sum(p.system + (p.vision if step % every == 0 else p.core) for p in plans)
    assert sum(u.read for u in use) == pytest.approx(read / len(left) * size)


def given(layer, row, prompt):
    """Prompt tokens among a row's text, a mean over KV heads."""
    held = layer.text_positions(row)
    return float((held < prompt).sum()) / held.shape[0]
