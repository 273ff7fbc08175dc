"""Conversations of two turns with a model, token by token, on one cache; and beams; against the oracle."""

from __future__ import annotations

import pytest
import torch

import avlprof
from avlprof.attention.session import with_cache
from avlprof.testing.models import VOCABULARY
from tests.helpers import generate, one_row
from tests.oracle import NEAR_TIE, Oracle

STEPS = 7


def positions(case, turns, answers):
    """Position ids of every token of a padded conversation, `[.., B, n]`, as the model has them."""
    ids, mask = whole(turns, answers)
    plain = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if not hasattr(case.model.model, "get_rope_index"):
        return plain
    grids = [turn["image_grid_thw"] for turn in turns if "image_grid_thw" in turn]
    order = []  # the model takes the pictures row by row, the turns come one behind the other
    counts = [(turn["input_ids"] == 2).any(dim=1).long().tolist() for turn in turns]
    for row in range(len(ids)):
        for index, turn in enumerate(turns):
            if counts[index][row]:
                order.append(turn["image_grid_thw"][sum(counts[index][:row])])
    assert sum(len(g) for g in grids) == len(order)
    index, _ = case.model.model.get_rope_index(
        ids,
        image_grid_thw=torch.stack(order),
        attention_mask=mask,
        mm_token_type_ids=(ids == 2).long(),
    )
    return torch.cat([plain[None], index])


def whole(turns, answers):
    ids, mask = [], []
    for turn, answer in zip(turns, answers, strict=True):
        ids += [turn["input_ids"], answer]
        mask += [turn["attention_mask"], torch.ones_like(answer)]
    return torch.cat(ids, dim=1), torch.cat(mask, dim=1)


@torch.inference_mode()
def converse(case, policy, turns, answers):
    """Logits of each turn, `[B, answer + 1, V]`, and the cache."""
    _, mask = whole(turns, answers)
    places = positions(case, turns, answers)
    at, found = 0, []
    with avlprof.apply(case.model, policy) as runtime:
        cache = runtime.new_cache()
        for turn, answer in zip(turns, answers, strict=True):
            fed = [{k: v for k, v in turn.items() if k != "attention_mask"}]
            fed += [{"input_ids": answer[:, i : i + 1]} for i in range(answer.shape[1])]
            logits = []
            for inputs in fed:
                end = at + inputs["input_ids"].shape[1]
                out = case.model(
                    **inputs,
                    attention_mask=mask[:, :end],
                    position_ids=places[..., at:end],
                    **with_cache(case.model, cache),
                )
                logits.append(out.logits[:, -1])
                at = end
            found.append(torch.stack(logits, dim=1))
    return found, cache


def conversation(case, seed, batch=2):
    """A padded first turn, a second one of equal lengths with a new picture, and answers."""
    first = case.inputs(batch=batch, seed=seed, pad=True, text=15)
    second = case.inputs(batch=batch, seed=seed + 50, text=11)
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.randint(5, VOCABULARY - 2, (batch, n), generator=generator) for n in (STEPS, STEPS + 3)]
    return [first, second], answers


def checked_turns(case, policy, seeds, least):
    """Cache, row, its padding and the oracle's trace of rows of two turns; their logits are checked.

    At least so many rows that no near-tie decides, out of conversations of these seeds.
    """
    compared = 0
    for seed in seeds:
        turns, answers = conversation(case, seed)
        ours, cache = converse(case, policy, turns, answers)
        for row in range(2):
            singles = [
                (one_row(case, turn, row), answer[row].tolist())
                for turn, answer in zip(turns, answers, strict=True)
            ]
            wanted, trace = Oracle(case.model, policy, case.vision_token_ids).converse(singles)
            if trace.gap < NEAR_TIE:
                continue
            compared += 1
            for mine, theirs in zip(ours, wanted, strict=True):
                torch.testing.assert_close(mine[row], theirs, atol=1e-4, rtol=1e-4)
            yield cache, row, int((turns[0]["attention_mask"][row] == 0).sum()), trace
        if compared >= least:
            return
    raise AssertionError("near-ties decide the sets of every seed")


def check_beams(case, policy, steps, least):
    """Scores of beams against the oracle's of the same answers: at least so many without near-ties."""
    compared = 0
    for seed in range(3, 15):
        inputs = case.inputs(batch=2, seed=seed, pad=True, text=9)
        with avlprof.apply(case.model, policy):
            found = generate(
                case.model, inputs, steps, num_beams=3, num_return_sequences=2, output_scores=True
            )
        width = inputs["input_ids"].shape[1]
        for index, ids in enumerate(found.sequences):
            answer = ids[width:].tolist()
            oracle = Oracle(case.model, policy, case.vision_token_ids)
            logits, trace = oracle.run(one_row(case, inputs, index // 2), answer[:-1])
            if trace.gap > NEAR_TIE:
                compared += 1
                said = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
                assert float(found.sequences_scores[index]) == pytest.approx(float(said.mean()), abs=1e-4)
        if compared >= least:
            return
    raise AssertionError("near-ties decide the sets of every seed")
