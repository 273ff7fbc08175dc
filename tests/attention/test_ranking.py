"""The three ways to rank, against a sort in plain Python; scores of few values, so that most of them tie."""

from __future__ import annotations

import pytest
import torch

from avlprof.attention.ranking import best, best_slots, ranks

BATCH, GROUPS, TOKENS = 3, 2, 17


@pytest.fixture
def tokens():
    """Scores, candidates and positions of tokens."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (BATCH, GROUPS, TOKENS), generator=generator) / 8
    candidates = torch.rand(BATCH, 1, TOKENS, generator=generator) < 0.7
    rows = [torch.randperm(99, generator=generator)[:TOKENS] for _ in range(BATCH * GROUPS)]
    return scores, candidates, torch.stack(rows).view(BATCH, GROUPS, TOKENS)


def chosen(scores, candidates, positions, counts):
    """Sets of the best candidates by row and group."""
    found = {}
    for row in range(BATCH):
        for group in range(GROUPS):
            able = candidates[row, 0].nonzero()[:, 0].tolist()
            able.sort(key=lambda i: (-float(scores[row, group, i]), int(positions[row, group, i])))
            found[row, group] = set(able[: counts[row]])
    return found


def sets(marks):
    return {(b, g): set(marks[b, g].nonzero()[:, 0].tolist()) for b in range(BATCH) for g in range(GROUPS)}


@pytest.mark.parametrize("counts", [(4, 0, 6), (5, 5, 5)])
def test_marked_tokens_are_the_first_of_a_sort(tokens, counts):
    scores, candidates, positions = tokens
    expected = chosen(scores, candidates, positions, counts)
    marks = best(scores, candidates, torch.tensor(counts), positions)
    assert sets(marks) == expected
    even = len(set(counts)) == 1
    slots = best_slots(
        scores, candidates, torch.tensor(counts).view(-1, 1, 1), positions, most=max(counts), even=even
    )
    assert sets(slots) == expected


def test_by_column_where_no_positions_are_given(tokens):
    scores, candidates, _ = tokens
    columns = torch.arange(TOKENS).expand_as(scores)
    expected = chosen(scores, candidates, columns, (4, 2, 6))
    assert sets(best(scores, candidates, torch.tensor((4, 2, 6)))) == expected
    rank = ranks(scores.masked_fill(~candidates, float("-inf")))
    assert sets(rank < torch.tensor((4, 2, 6)).view(-1, 1, 1)) == expected
