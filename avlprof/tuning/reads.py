"""Spread what a policy reads per step over its layers, at a read budget."""

from __future__ import annotations

from collections.abc import Sequence

from avlprof.allocators import meet_read_budget
from avlprof.policy import Policy, PromptShape


def spread_reads(
    policy: Policy,
    shares: Sequence[float],
    prompts: Sequence[PromptShape],
    read_budget: float,
    answer_tokens: int,
) -> Policy:
    """The policy with a core in each layer, in proportion to `shares`, at a read budget.

    Its kept shares, text, refresh interval and kind of refresh stay; see `meet_read_budget`.

    Raises:
        UserError: system, text and refreshes alone read more; `Space.within` keeps such policies out.
    """
    compute = meet_read_budget(
        policy.keep(len(shares)),
        prompts,
        policy.refresh_interval,
        read_budget,
        answer_tokens,
        policy.text,
        shares,
        refresh=policy.refresh,
    )
    return policy.model_copy(update={"vision_compute": compute})
