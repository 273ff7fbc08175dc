"""Spread what a policy reads per step over its layers, at a read budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from avlprof.allocators.fit import hand_out, ratio_of
from avlprof.policy import Policy, PromptShape, read_share, tokens


def spread_reads(
    policy: Policy,
    shares: Sequence[float],
    prompts: Sequence[PromptShape],
    read_budget: float,
    answer_tokens: int,
) -> Policy:
    """The policy with a core in each layer, in proportion to `shares`, at a read budget.

    Its kept shares, text, refresh interval and kind of refresh stay. The result reads at most
    `read_budget` of the dense prompt KV per step, refreshes included; one more token in the
    next layer would read more, unless all cores are full.

    Raises:
        ValueError: system, text and refreshes alone read more; `Space.within` keeps such policies out.
    """
    layers = len(shares)
    largest = max(prompt.vision for prompt in prompts)
    keep = policy.keep(layers)
    caps = np.array([tokens(share, largest) for share in keep])
    shapes = Counter(prompts)
    dense = sum(prompt.total for prompt in prompts)

    def at(total: int) -> Policy:
        counts = hand_out(shares, total, np.zeros_like(caps), caps)
        compute = tuple(
            share if count == cap else min(ratio_of(int(count), largest), share)
            for count, cap, share in zip(counts, caps, keep, strict=True)
        )
        return policy.model_copy(update={"vision_compute": compute})

    def fits(total: int) -> bool:
        some = at(total)
        used = sum(
            times * shape.total * read_share(some, [shape], layers, answer_tokens)
            for shape, times in shapes.items()
        )
        return used / dense <= read_budget + 1e-12

    if not fits(0):
        raise ValueError(f"the policy reads more than {read_budget} without any core")
    low, high = 0, int(caps.sum()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # the sum over single prompts is judged without the rounding of `fits`
    while low > 0 and read_share(at(low), prompts, layers, answer_tokens) > read_budget:
        low -= 1
    return at(low)
