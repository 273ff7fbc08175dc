"""The kernel that exchanges slots against exchanging them one by one."""

from __future__ import annotations

import pytest
import torch

from tests.interpreted import DEVICE, passes, runs_elsewhere, runs_here

CASES = {
    "one set": {"groups": 1, "position_heads": 1},
    "one set, positions of heads": {"groups": 1, "position_heads": 3},
    "sets of heads": {"groups": 3, "position_heads": 3},
    "wide": {"groups": 1, "position_heads": 1, "columns": 2050, "core": 700, "size": 20, "value_size": 8},
    "nothing changes": {"groups": 1, "position_heads": 1, "same": True},
    "rows of other sizes": {"groups": 3, "position_heads": 3, "batch": 4, "ragged": True},
}


@pytest.mark.full
@runs_elsewhere
def test_the_exchange_in_the_interpreter():
    passes(__file__, len(CASES), "-k", "pairs")


@runs_here
@pytest.mark.parametrize("name", CASES)
def test_pairs_are_exchanged_and_nothing_else_moves(name):
    from avlprof.runtime.triton_exchange import triton_exchange

    sizes = {"batch": 2, "columns": 70, "core": 20, "size": 16, "value_size": 16} | CASES[name]
    batch, columns, core, heads = sizes["batch"], sizes["columns"], sizes["core"], 3
    generator = torch.Generator().manual_seed(columns)
    counts = [core - 3 * row if sizes.get("ragged") else core for row in range(batch)]
    old = torch.zeros(batch, 1, columns, dtype=torch.bool)
    new = torch.zeros(batch, sizes["groups"], columns, dtype=torch.bool)
    for row, count in enumerate(counts):
        old[row, 0, torch.randperm(columns, generator=generator)[:count]] = True
        for group in range(sizes["groups"]):
            new[row, group, torch.randperm(columns, generator=generator)[:count]] = True
    if sizes.get("same"):
        new = old.clone()
    capacity = columns + 9
    keys = torch.randn(batch, heads, capacity, sizes["size"], generator=generator)
    values = torch.randn(batch, heads, capacity, sizes["value_size"], generator=generator)
    positions = torch.arange(capacity).expand(batch, sizes["position_heads"], -1).contiguous()
    wanted = [buffer.clone() for buffer in (keys, values, positions)]
    for row in range(batch):
        for head in range(heads):
            group = head if sizes["groups"] > 1 else 0
            leaving = (old[row, 0] & ~new[row, group]).nonzero()[:, 0].tolist()
            entering = (new[row, group] & ~old[row, 0]).nonzero()[:, 0].tolist()
            for a, b in zip(leaving, entering, strict=True):
                for buffer in wanted:
                    if head < buffer.shape[1]:
                        buffer[row, head, [a, b]] = buffer[row, head, [b, a]]
    there = tuple(buffer.to(DEVICE) for buffer in (keys, values, positions))
    triton_exchange(there, old.to(DEVICE), new.to(DEVICE), core)
    for found, expected in zip(there, wanted, strict=True):
        assert torch.equal(found.cpu(), expected)
