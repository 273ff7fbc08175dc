"""The kernels that pick a core anew against a sort and an exchange slot by slot, in plain Python."""

from __future__ import annotations

import pytest
import torch

from avlprof.runtime.eviction import CoreSlots
from avlprof.runtime.layout import RowPlan, slot_classes
from tests.interpreted import DEVICE, passes, runs_elsewhere, runs_here

CASES = {
    "one set": {},
    "one set, positions of heads": {"places": 3},
    "sets of heads": {"groups": 3, "places": 3},
    "ties": {"levels": 4, "groups": 3, "places": 3},
    "all equal": {"levels": 1},
    "small and large": {"powers": True, "levels": 40},
    "several blocks": {"vision": 150, "core": 60, "size": 20, "value_size": 8, "levels": 9, "block": 32},
    "nothing changes": {"same": True},
    "no core in one row": {"cores": (0, 9), "levels": 2},
    "all core in one row": {"cores": (30, 9), "levels": 2},
    "rows of other sizes": {"ragged": True, "groups": 3, "places": 3, "levels": 6},
    "a step of all slots": {"start": 0},
}
HEADS = 3


@pytest.mark.full
@runs_elsewhere
def test_the_refresh_in_the_interpreter():
    passes(__file__, len(CASES), "-k", "best_become")


def scores_of(case, shape, generator):
    """Scores that are not negative, of a few levels where so many are asked for."""
    if "levels" not in case:
        return torch.rand(shape, generator=generator)
    levels = torch.rand(case["levels"], generator=generator)
    if case.get("powers"):  # from 0 and numbers without a leading bit up to 1
        levels = 2.0 ** torch.linspace(-149, 0, case["levels"])
        levels[0] = 0.0
    return levels[torch.randint(len(levels), shape, generator=generator)]


@runs_here
@pytest.mark.parametrize("name", CASES)
def test_the_best_become_the_core_and_nothing_else_moves(name, monkeypatch):
    from avlprof.runtime import triton_exchange

    case = {"groups": 1, "places": 1, "vision": 30, "core": 9, "size": 16, "value_size": 16} | CASES[name]
    monkeypatch.setattr(triton_exchange, "_COLUMNS", case.get("block", 64))
    generator = torch.Generator().manual_seed(len(name))
    cores = case.get("cores", (case["core"],) * 2)
    plans = [RowPlan(2 + row, case["vision"], core, 0, 0, None) for row, core in enumerate(cores)]
    if case.get("ragged"):
        plans += [RowPlan(1, 12, 5, 0, 0, None), RowPlan(4, 0, 0, 0, 0, None)]
    batch, left = len(plans), max(plan.system + plan.vision for plan in plans)
    start = case.get("start", left - max(plan.system + plan.vision for plan in plans))
    core = CoreSlots.of(plans, slot_classes(plans, [0] * batch, left, left, torch.device("cpu")))
    scores = scores_of(case, (batch, case["groups"], left - start), generator)
    capacity = left + 7
    positions = torch.stack([torch.randperm(200, generator=generator)[:capacity] for _ in range(batch * 3)])
    positions = positions.view(batch, 3, -1)[:, : case["places"]].contiguous()
    if case.get("same"):
        scores[:] = 0.1
        scores[core.core.expand_as(scores)] = 0.9
    keys = torch.randn(batch, HEADS, capacity, case["size"], generator=generator)
    values = torch.randn(batch, HEADS, capacity, case["value_size"], generator=generator)
    wanted = [buffer.clone() for buffer in (keys, values, positions)]
    marks = core.best(scores, positions[..., :left], case["groups"])
    for row, plan in enumerate(plans):
        end = left - plan.system
        vision, old = range(end - plan.vision, end), set(range(end - plan.core, end))
        for head in range(HEADS):
            own = head if case["groups"] > 1 else 0
            ranked = sorted(
                vision,
                key=lambda slot: (-float(scores[row, own, slot - start]), int(positions[row, own, slot])),
            )
            new = set(ranked[: plan.core])
            assert new == set(marks[row, own].nonzero()[:, 0].tolist())
            for a, b in zip(sorted(old - new), sorted(new - old), strict=True):
                for buffer in wanted:
                    if head < buffer.shape[1]:
                        buffer[row, head, [a, b]] = buffer[row, head, [b, a]]
    there = tuple(buffer.to(DEVICE) for buffer in (keys, values, positions))
    triton_exchange.triton_refresh(there, scores.to(DEVICE), start, core.edges.to(DEVICE), core.exchanges)
    for found, expected in zip(there, wanted, strict=True):
        assert torch.equal(found.cpu(), expected)
