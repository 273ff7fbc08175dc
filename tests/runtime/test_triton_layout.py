"""The kernels that lay a prompt out against sorts in plain Python, and against the operators of a CPU."""

from __future__ import annotations

import pytest
import torch

import avlprof
from avlprof.attention.session import with_cache
from avlprof.policy import Policy, ScorerSpec
from avlprof.runtime.layout import RowPlan
from avlprof.testing.models import random_llava
from tests.helpers import Counted
from tests.interpreted import DEVICE, Launched, passes, runs_elsewhere, runs_here
from tests.policies import POLICIES

CASES = {
    "one row": {"plans": [RowPlan(3, 9, 4, 5, 0, None)]},
    "sets of heads": {"plans": [RowPlan(3, 9, 4, 5, 0, None), RowPlan(1, 0, 0, 11, 0, None)], "groups": 3},
    "a window with sinks": {"plans": [RowPlan(2, 6, 6, 4, 3, 4), RowPlan(0, 20, 1, 2, 5, 4)], "levels": 3},
    "all equal": {"plans": [RowPlan(1, 7, 3, 6, 1, None)] * 2, "levels": 1},
    "negative": {"plans": [RowPlan(1, 12, 5, 6, 0, None)] * 2, "levels": 7, "low": -3.0},
    "several blocks": {"plans": [RowPlan(5, 21, 12, 40, 2, None)] * 2, "levels": 5, "block": 16},
    "in longer buffers": {"plans": [RowPlan(3, 9, 4, 5, 0, None), RowPlan(1, 2, 1, 3, 0, None)], "spare": 7},
    "no vision": {"plans": [RowPlan(4, 0, 0, 3, 1, 3), RowPlan(0, 0, 0, 0, 0, None)]},
}
FREE = 5
ROOMS = ("buffers", "eviction", "cored")


@pytest.mark.full
@runs_elsewhere
def test_the_layout_in_the_interpreter():
    passes(__file__, len(CASES) + len(EVICTING), "-k", "every_slot or launches")


def prompt_of(plans, generator):
    """Modality codes with what the plans keep and more, in an order of turns, padded in front."""
    rows = []
    for plan in plans:
        vision, text = plan.vision + (4 if plan.vision else 0), plan.text + 3
        first = text // 2
        codes = [0] * plan.system + [1] * (vision // 2) + [2] * first + [1] * (vision - vision // 2)
        rows.append(torch.tensor(codes + [2] * (text - first)))
    length = max(map(len, rows)) + 2
    return torch.stack([torch.cat([torch.full((length - len(r),), -1), r]) for r in rows])


def wanted_order(scores, codes, plan, left):
    """The columns that one row's slots hold, by slot."""
    where = {code: (codes == code).nonzero()[:, 0].tolist() for code in (0, 1, 2)}
    ranked = sorted(where[1], key=lambda column: (-float(scores[column]), column))
    core, kept = set(ranked[: plan.core]), set(ranked[: plan.vision])
    sink = min(plan.sink, plan.text)
    newest = where[2][len(where[2]) - (plan.text - sink) :] if plan.text > sink else []
    parts = [sorted(kept - core), sorted(core), where[0], where[2][:sink], newest]
    begin = left - plan.system - plan.vision
    return dict(enumerate((column for part in parts for column in part), start=begin))


@runs_here
@pytest.mark.parametrize("name", CASES)
def test_every_slot_holds_its_token(name, monkeypatch):
    from avlprof.runtime import triton_layout

    case = {"groups": 1} | CASES[name]
    monkeypatch.setattr(triton_layout, "_COLUMNS", case.get("block", 64))
    plans, groups, heads = case["plans"], case["groups"], 3
    generator = torch.Generator().manual_seed(len(name))
    codes = prompt_of(plans, generator)
    batch, length = codes.shape
    scores = torch.rand(batch, groups, length, generator=generator) + case.get("low", 0.0)
    if "levels" in case:  # zeros of both signs are equal
        levels = torch.linspace(case.get("low", 0.0), 2.0, case["levels"])
        scores = levels[torch.randint(len(levels), scores.shape, generator=generator)]
        scores = torch.where((scores == 0.0) & (torch.arange(length) % 2 == 0), -0.0, scores)
    left = max(plan.system + plan.vision for plan in plans) + case.get("spare", 0)
    text = max(plan.text for plan in plans)
    width = left + text
    texts = (codes == 2).sum(dim=1).tolist()
    order = triton_layout.prompt_order(
        scores.to(DEVICE), codes.to(torch.int8).to(DEVICE), plans, texts, (left, text)
    )
    key, value = (torch.randn(batch, heads, length, size, generator=generator) for size in (8, 20))
    positions = torch.arange(length).expand(batch, groups, -1) * 2
    there = [tensor.to(DEVICE) for tensor in (key, value, positions)]
    into = None
    if "spare" in case:  # buffers of an earlier prompt, which hold its tokens
        into = tuple(torch.full((*t.shape[:2], width + FREE, *t.shape[3:]), 7, dtype=t.dtype) for t in there)
        into = tuple(buffer.to(DEVICE) for buffer in into)
    found = [part.cpu() for part in triton_layout.taken_slots(*there, order, FREE, into)]
    assert into is None or found[0].data_ptr() == into[0].data_ptr() or DEVICE != "cpu"
    assert [part.shape[2] for part in found] == [width + FREE] * 3
    for row, plan in enumerate(plans):
        for head in range(heads):
            own = head if groups > 1 else 0
            wanted = wanted_order(scores[row, own], codes[row], plan, left)
            assert len(wanted) == plan.system + plan.vision + plan.text
            slots, columns = map(list, (wanted.keys(), wanted.values()))
            assert order[row, own, slots].tolist() == columns
            free = sorted(set(range(width)) - set(slots))
            assert torch.equal(found[0][row, head, slots], key[row, head, columns])
            assert torch.equal(found[1][row, head, slots], value[row, head, columns])
            assert torch.equal(found[2][row, own, slots], 2 * torch.tensor(columns, dtype=torch.long))
            assert ((order[row, own, free] >= 0) & (order[row, own, free] < length)).all()
            assert not found[0][row, head, width:].any()
            assert (found[2][row, own, width:] == -1).all()


EVICTING = {
    "keep": (Policy(vision_keep=0.3), 14),
    "core and window": (POLICIES["core and window"], 14),
    "valued": (Policy(vision_keep=0.3, scorer=ScorerSpec(name="valued", options={"of": "instruction"})), 21),
}
"""Policies, and the most that a layer launches to score, choose and move: kernels and operators."""


@runs_here
@pytest.mark.parametrize("name", EVICTING)
def test_eviction_takes_few_launches(name, monkeypatch):
    from avlprof.attention import triton_column_sums
    from avlprof.runtime import triton_layout

    for module in ("attention.column_sums", "scorers._base", *(f"runtime.{part}" for part in ROOMS)):
        monkeypatch.setattr(f"avlprof.{module}.kernels_run", lambda tensor: True)
    case, kernels, counts = random_llava(), [], []
    for module, kernel in (
        *((triton_column_sums, kernel) for kernel in ("_row_lse", "_key_sums")),
        *((triton_layout, kernel) for kernel in ("order_columns", "take_columns")),
    ):
        monkeypatch.setattr(module, kernel, Launched(getattr(module, kernel), kernels))
    policy, most = EVICTING[name]
    with avlprof.apply(case.model, policy) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        layer = type(cache.layers[0])
        own = layer.compact

        def counted(self, *arguments):
            with Counted() as found:
                own(self, *arguments)
            counts.append([name for name in found.names if not name.startswith("lift")])

        monkeypatch.setattr(layer, "compact", counted)
        case.model(**case.inputs(batch=2, text=15), **with_cache(case.model, cache))
    assert len(kernels) == 4 * len(cache.layers)
    assert all(4 + len(names) <= most for names in counts), counts
