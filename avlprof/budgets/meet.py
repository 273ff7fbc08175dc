"""From relative shares to ratios that meet a memory or a read budget on given prompts.

Budgets are shares of the dense prompt KV, summed over prompts; `policy.live_share` and
`policy.read_share` are the judges, so prompts may differ in size. Layers that are not counted get
no share of a budget: what they keep is 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from avlprof.bisection import largest, largest_share
from avlprof.budgets.fit import check_unit, floor_count, hand_out, ratio_of
from avlprof.errors import UserError
from avlprof.policy import (
    FULL,
    Bits,
    Policy,
    PromptShape,
    Refresh,
    TextPolicy,
    broadcast,
    counted_layers,
    live_share,
    packed_share,
    read_share,
    tokens,
)

ALL_TEXT = TextPolicy()


@dataclass(frozen=True)
class ReadBudget:
    """What may be read of the prompt KV per decoding step, and how it is read.

    Attributes:
        share: mean prompt KV read per decoding step over dense, refreshes included, in [0, 1].
        answer_tokens: decoding steps that the mean is taken over.
        refresh_interval: every so many steps all kept vision tokens are read; 0 means never.
        refresh: what a refresh reads: all kept vision tokens, or (`score_only`, `triggered`) their keys.
        refresh_layers: the layers that read then; None: all.
        refreshed: share of steps that refresh where these are triggered, layer by layer, as measured; None:
            as many as there can be.
    """

    share: float
    answer_tokens: int
    refresh_interval: int = 0
    refresh: Refresh = "full"
    refresh_layers: tuple[int, ...] | None = None
    refreshed: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        policy: Policy,
        share: float,
        answer_tokens: int,
        refreshed: tuple[float, ...] | None = None,
    ) -> ReadBudget:
        """A budget of so much, for the refreshes of a policy."""
        own = policy.refresh_interval, policy.refresh, policy.refresh_layers
        return cls(share, answer_tokens, *own, refreshed)


def vision_share(
    prompts: Sequence[PromptShape],
    layers: int,
    budget: float,
    text: TextPolicy = ALL_TEXT,
    bits: Bits = FULL,
) -> float:
    """The mean share of vision tokens that a budget leaves once system and text are paid, in [0, 1].

    All of them are stored in `bits` bits a number.

    Raises:
        UserError: the budget is out of range, or system and text alone need more.
    """
    check_unit("budget", budget)
    if not prompts:
        raise UserError("a budget needs at least one prompt to be counted on; the run has no samples")
    least = live_share(Policy(vision_keep=0.0, text=text), prompts, layers)
    if least > budget:
        raise UserError(
            f"budget {budget:g} is below {_up(least)}, what system and text alone need; "
            "raise the budget or set a text window"
        )
    own, each = counted_layers(prompts, layers), broadcast(bits, layers)
    price = sum(packed_share(each[layer], prompts[0].group) for layer in own) / max(len(own), 1)
    vision = price * sum(prompt.vision for prompt in prompts)
    left = (budget - least) * sum(prompt.total for prompt in prompts)
    return min(left / vision, 1.0) if vision else 1.0


def meet_budget(
    shares: Sequence[float],
    prompts: Sequence[PromptShape],
    budget: float,
    text: TextPolicy = ALL_TEXT,
    floor: float = 0.0,
    bits: Bits = FULL,
) -> tuple[float, ...]:
    """`vision_keep` of each layer, in proportion to `shares`, at a memory budget.

    Args:
        shares: relative kept share of each layer.
        prompts: token counts that the budget is counted on.
        budget: prompt KV live after prefill over dense, in [0, 1].
        text: what stays of text; it is paid first.
        floor: smallest kept share of a layer, as far as the budget allows.
        bits: `vision_bits` of a policy without a core, so that what is kept is stored so.

    Returns:
        Ratios with `live_share <= budget`; one more token in the next layer would exceed it.

    Raises:
        UserError: system and text alone need more than the budget.
    """
    layers = len(shares)
    vision_share(prompts, layers, budget, text, bits)
    check_unit("floor", floor)
    most = max(prompt.vision for prompt in prompts)
    own = counted_layers(prompts, layers)
    floors, caps = np.full(len(own), floor_count(floor, most)), np.full(len(own), most)
    relative = [shares[layer] for layer in own]

    def policy(total: int) -> Policy:
        counts = hand_out(relative, total, floors, caps)
        keep = in_place([ratio_of(int(count), most) for count in counts], own, (1.0,) * layers)
        return Policy(vision_keep=keep, vision_bits=bits, text=text)

    total = _most(policy, lambda p, some: live_share(p, some, layers), prompts, most * len(own), budget)
    return policy(total).keep(layers)


def meet_read_budget(
    keep: Sequence[float],
    prompts: Sequence[PromptShape],
    reads: ReadBudget,
    text: TextPolicy = ALL_TEXT,
    shares: Sequence[float] | None = None,
    floor: float = 0.0,
    bits: Bits = FULL,
) -> tuple[float, ...]:
    """`vision_compute` of each layer at a read budget; never above `keep`.

    Args:
        keep: `vision_keep` of each layer.
        prompts: token counts that the budget is counted on.
        reads: the budget, and how often and how the core is refreshed.
        text: what stays of text; it is read at every step.
        shares: relative computed share of each layer; without them it is in proportion to `keep`.
        floor: smallest computed share of a layer, as far as keep and budget allow.
        bits: `vision_bits` outside the core, which refreshes read.

    Returns:
        Ratios with `read_share <= reads.share`; one more token in the next layer would exceed it.

    Raises:
        UserError: system, text and refreshes alone read more than the budget.
    """
    check_unit("read_budget", reads.share)
    check_unit("floor", floor)
    layers = len(keep)
    if not prompts:
        raise UserError("a read budget needs at least one prompt to be counted on; the run has no samples")
    most = max(prompt.vision for prompt in prompts)
    own = counted_layers(prompts, layers)
    kept = [keep[layer] for layer in own]
    caps = np.array([_within(share, most) for share in kept])
    floors = np.minimum(floor_count(floor, most), caps)
    relative = kept if shares is None else [shares[layer] for layer in own]

    def policy(total: int) -> Policy:
        counts = hand_out(relative, total, floors, caps)
        compute = [
            share if count == cap else min(ratio_of(int(count), most), share)
            for count, cap, share in zip(counts, caps, kept, strict=True)
        ]
        return Policy(
            vision_keep=tuple(keep),
            vision_compute=in_place(compute, own, keep),
            refresh_interval=reads.refresh_interval,
            refresh=reads.refresh,
            refresh_layers=reads.refresh_layers,
            vision_bits=bits,
            text=text,
        )

    def used(some_policy: Policy, some: Sequence[PromptShape]) -> float:
        return read_share(some_policy, some, layers, reads.answer_tokens, reads.refreshed)

    least = used(policy(0), prompts)
    if least > reads.share:
        every = reads.refresh_interval
        refreshes = f" and refreshes every {every} steps" if every else ""
        raise UserError(
            f"read budget {reads.share:g} is below {_up(least)}, what system, text{refreshes} read alone; "
            "raise the read budget, lower the budget, refresh less often or set a text window"
        )
    return policy(_most(policy, used, prompts, int(caps.sum()), reads.share)).compute(layers)


def meet_both(
    shares: Sequence[float],
    prompts: Sequence[PromptShape],
    budget: float,
    reads: ReadBudget,
    text: TextPolicy = ALL_TEXT,
    floor: float = 0.0,
    bits: Bits = FULL,
    follow: Callable[[tuple[float, ...]], Sequence[float]] = tuple,
) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """`vision_keep` of each layer, and `vision_compute` or None for no core, at a memory and a read budget.

    With fewer bits than 16 a core takes more memory than what is stored beside it: where all that is kept
    may be read there is none, else both shares are the largest of their kind, to a thousandth of the
    budget.

    Args:
        shares: relative kept share of each layer.
        follow: from kept shares to relative computed ones.
    """
    layers = len(shares)

    def at(memory: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        keep = meet_budget(shares, prompts, memory, text, floor, bits)
        return keep, meet_read_budget(keep, prompts, reads, text, follow(keep), bits=bits)

    def fits(memory: float) -> bool:
        keep, core = at(memory)
        policy = Policy(vision_keep=keep, vision_compute=core, vision_bits=bits, text=text)
        return live_share(policy, prompts, layers) <= budget

    if set(broadcast(bits, layers)) == {FULL}:
        return at(budget)
    bare = Policy(
        vision_keep=meet_budget(shares, prompts, budget, text, floor, bits), vision_bits=bits, text=text
    )
    if read_share(bare, prompts, layers, reads.answer_tokens) <= reads.share:
        return bare.keep(layers), None
    least = live_share(Policy(vision_keep=0.0, text=text), prompts, layers)
    return at(budget if fits(budget) else largest_share(fits, least, budget, halvings=10))


def in_place(ratios: Sequence[float], own: Sequence[int], elsewhere: Sequence[float]) -> tuple[float, ...]:
    """One ratio a layer: `ratios` in the layers `own`, and what `elsewhere` says in the others."""
    known = dict(zip(own, ratios, strict=True))
    return tuple(known.get(layer, ratio) for layer, ratio in enumerate(elsewhere))


def _within(share: float, count: int) -> int:
    """Tokens up to which a layer may compute; the last means `share` itself, also between two counts."""
    whole = tokens(share, count)
    return whole if share <= ratio_of(whole, count) else whole + 1


def _most(
    policy: Callable[[int], Policy],
    share: Callable[[Policy, Sequence[PromptShape]], float],
    prompts: Sequence[PromptShape],
    top: int,
    budget: float,
) -> int:
    """The largest total in [0, top] whose policy uses `budget` or less; `policy(0)` must.

    Prompts of one shape are counted once; the answer is checked on the full list, in which no
    rounding of sums is left.
    """
    shapes = Counter(prompts)
    dense = sum(prompt.total for prompt in prompts)

    def fits(total: int) -> bool:
        candidate = policy(total)
        used = sum(times * shape.total * share(candidate, [shape]) for shape, times in shapes.items())
        return used / dense <= budget + 1e-12

    total = largest(fits, top)
    while total > 0 and share(policy(total), prompts) > budget:
        total -= 1
    return total


def _up(share: float) -> str:
    """A share rounded up, so that what the message says is enough."""
    return f"{math.ceil(share * 1000 - 1e-9) / 1000:g}"
