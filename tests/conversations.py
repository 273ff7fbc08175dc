"""Conversations of two turns with a model, token by token, on one cache."""

from __future__ import annotations

import torch

import avlprof
from avlprof.attention.session import with_cache
from avlprof.testing.models import VOCABULARY

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
