"""Several turns on one cache, against a dense oracle of the whole conversation."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import DynamicCache

import avlprof
from avlprof.attention.session import with_cache
from avlprof.policy import DENSE, Policy, TextPolicy
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.testing.models import cases, random_llava
from tests.conversations import checked_turns, conversation, converse, positions, whole
from tests.helpers import few
from tests.oracle import Oracle
from tests.policies import POLICIES, TURNS

MODELS = dict(cases())


@pytest.fixture(scope="module", params=few(MODELS, ("llava-4q2kv-sinks",)))
def case(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("name", few(TURNS, ("history", "packed core")))
def test_two_turns_are_those_of_the_oracle(case, name):
    check_turns(case, TURNS[name])


@pytest.mark.full
def test_text_in_few_bits_over_two_turns():
    """Generated tokens stay in full, text moves as it is; padded rows; of one model, since it takes time."""
    check_turns(MODELS["llava-3q3kv"](), POLICIES["packed text and core"])


def check_turns(case, policy):
    """Logits and sets of two rows without near-ties against the oracle's."""
    for cache, row, padding, trace in checked_turns(case, policy, range(30, 42), 2):
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, AdaptiveLayer):
                continue
            held = [{p - padding for p in places.tolist()} for places in layer.text_positions(row)]
            assert held == trace.text[index][-1]
            if policy.joint is None:
                kept, core = layer.vision_positions(row)
                assert [{p - padding for p in r.tolist()} for r in kept] == trace.kept[index]
                assert [{p - padding for p in r.tolist()} for r in core] == trace.cores[index][-1]


def test_keep_all_is_the_stock_cache_over_two_turns(case):
    turns, answers = conversation(case, 40)
    _, mask = whole(turns, answers)
    places = positions(case, turns, answers)
    cache, at, stock = DynamicCache(config=case.model.config.get_text_config()), 0, []
    for turn, answer in zip(turns, answers, strict=True):
        fed = [{k: v for k, v in turn.items() if k != "attention_mask"}]
        fed += [{"input_ids": answer[:, i : i + 1]} for i in range(answer.shape[1])]
        for inputs in fed:
            end = at + inputs["input_ids"].shape[1]
            with torch.inference_mode():
                out = case.model(
                    **inputs,
                    attention_mask=mask[:, :end],
                    position_ids=places[..., at:end],
                    **with_cache(case.model, cache),
                )
            stock.append(out.logits[:, -1])
            at = end
    stock = torch.stack(stock, dim=1)
    for policy in (
        DENSE,
        Policy(text=TextPolicy(window=500)),
        Policy(heads="kv_head", text=TextPolicy(keep=1.0)),
    ):
        ours, _ = converse(case, policy, turns, answers)
        torch.testing.assert_close(torch.cat(ours, dim=1), stock, atol=1e-4, rtol=1e-4)


def test_generate_goes_on_with_a_cache(case):
    """As with the stock cache: the whole conversation's ids, and the new picture alone."""
    first, second = case.inputs(seed=3, text=12), case.inputs(seed=4, text=12)
    ours = spoken(case, first, second, DENSE)
    dense = spoken(case, first, second, None)
    assert torch.equal(ours.sequences, dense.sequences)
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(dense.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", few(["core", "history", "filter"], 2))
def test_generate_goes_on_under_a_policy(case, name):
    """Against a loop of one's own over the same tokens, which the oracle judges above."""
    first, second = case.inputs(seed=3, text=12), case.inputs(seed=4, text=12)
    told = spoken(case, first, second, TURNS[name])
    begin = first["input_ids"].shape[1] + 5
    new = told.sequences.shape[1] - 6 - begin
    turns = [first, dict(second, input_ids=told.sequences[:, begin : begin + new])]
    turns[1]["attention_mask"] = torch.ones_like(turns[1]["input_ids"])
    if "mm_token_type_ids" in second:
        turns[1]["mm_token_type_ids"] = (turns[1]["input_ids"] == 2).long()
    answers = [told.sequences[:, begin - 5 : begin], told.sequences[:, begin + new : -1]]
    wanted, _ = converse(case, TURNS[name], turns, answers)
    torch.testing.assert_close(torch.cat(told.logits), wanted[1][0], atol=1e-4, rtol=1e-4)


def spoken(case, first, second, policy):
    """The second of two calls of `generate` on one cache; without a policy it is a stock one."""
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(case.vision_token_ids)}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with contextlib.ExitStack() as stack:
        if policy is None:
            cache = DynamicCache(config=case.model.config.get_text_config())
        else:
            cache = stack.enter_context(avlprof.apply(case.model, policy)).new_cache()
        said = case.model.generate(**first, **with_cache(case.model, cache), **options).sequences
        ids = torch.cat([said, second["input_ids"]], dim=1)
        inputs = dict(second, input_ids=ids, attention_mask=torch.ones_like(ids))
        if "mm_token_type_ids" in second:
            inputs["mm_token_type_ids"] = (ids == 2).long()
            # transformers would ask for the grids of old pictures too, and then for their pixels
            answers = [said[:, first["input_ids"].shape[1] :], ids[:, :0]]
            inputs["position_ids"] = positions(case, [first, second], answers)
        return case.model.generate(**inputs, **with_cache(case.model, cache), **options)


def test_a_turn_of_text_alone_and_a_picture_that_comes_late():
    """Before the first picture all that a user gives is system text; what is generated is not."""
    case = random_llava()
    policy = Policy(vision_keep=0.5, text=TextPolicy(window=4, sink=1))
    text = case.inputs(seed=1, images_per_row=0, text=9)
    picture, more = case.inputs(seed=2, text=10), case.inputs(seed=3, images_per_row=0, text=6)
    answers = [torch.full((1, 3), 9), torch.full((1, 5), 11), torch.full((1, 4), 13)]
    turns = [text, picture, more]
    ours, cache = converse(case, policy, turns, answers)
    wanted, _ = Oracle(case.model, policy, case.vision_token_ids).converse(
        [(turn, answer[0].tolist()) for turn, answer in zip(turns, answers, strict=True)]
    )
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine[0], theirs, atol=1e-4, rtol=1e-4)
    given = sum(turn["input_ids"].shape[1] for turn in turns)
    assert cache.rows[0].total == given
    assert all(use.dense_prompt == given * cache.layers[0].bytes_per_token() for use in cache.use())


def test_a_prompt_in_chunks_is_a_turn_a_chunk():
    case = random_llava()
    inputs = case.inputs(text=12)
    with avlprof.apply(case.model, TURNS["window"]) as runtime:
        cache = runtime.new_cache()
        case.model.generate(**inputs, **with_cache(case.model, cache), prefill_chunk_size=8, max_new_tokens=1)
    chunks = inputs["input_ids"].split(8, dim=1)
    assert len(chunks) > 3
    kept = sum(int(0.5 * int((chunk == 2).sum()) + 1e-6) for chunk in chunks)
    assert [layer.plans[0].vision for layer in cache.layers] == [kept] * 3
