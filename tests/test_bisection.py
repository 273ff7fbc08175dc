"""Bisection against asking every number."""

from __future__ import annotations

import pytest

from avlprof.bisection import largest, largest_share


@pytest.mark.parametrize("top", [0, 1, 2, 7, 100])
def test_largest_is_what_asking_all_gives(top):
    for edge in range(-1, top + 3):
        asked = []

        def fits(number, edge=edge, asked=asked):
            asked.append(number)
            return number <= edge

        assert largest(fits, top) == max([0, *(n for n in range(top + 1) if n <= edge)])
        assert 0 not in asked
        assert all(number <= top for number in asked)
        assert len(asked) <= top.bit_length() + 1


@pytest.mark.parametrize("edge", [0.2, 0.37, 0.9])
def test_largest_share_is_below_the_edge_and_near(edge):
    share = largest_share(lambda share: share <= edge, 0.2, 0.9, halvings=12)
    assert share <= edge
    assert edge - share <= 0.7 / 2**12 + 1e-12
