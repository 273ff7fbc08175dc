"""Any policy at any budget, its shape over layers kept: what makes methods comparable at equal bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from avlprof.allocators._base import Evidence
from avlprof.bisection import largest, largest_share
from avlprof.budgets.fit import check_unit, hand_out, ratio_of
from avlprof.budgets.meet import in_place, vision_share
from avlprof.budgets.resolve import resolve
from avlprof.errors import UserError
from avlprof.policy import (
    PicturePolicy,
    Policy,
    PromptShape,
    broadcast,
    counted_layers,
    dense_tokens,
    live_share,
    sizes,
    tokens,
)

HALVINGS = 20
"""Of the share of a picture's tokens that fits: finer than a token of a million."""


class OverBudgetError(UserError):
    """A policy that cannot go down to a budget; `floor` is the least share that it can."""

    def __init__(self, policy: Policy, budget: float, floor: float) -> None:
        self.floor = floor
        up = math.ceil(floor * 1000 - 1e-9) / 1000
        super().__init__(f"budget {budget:g} is below {up:g}, the least that policy '{policy.name}' can hold")


def scale_to(
    policy: Policy,
    budget: float,
    prompts: Sequence[PromptShape],
    layers: int,
    evidence: Evidence | None = None,
) -> Policy:
    """The policy scaled to a memory budget: never above, at most one token a layer below.

    - Split pool: `vision_keep` is scaled in proportion, as `meet_budget` does it, and
      `vision_compute` keeps its ratio to it; `vision_bits` stay. Text is left as it is and paid first.
    - Joint pool: `joint.keep` is scaled in proportion; sinks and newest tokens stay as they are.
    - With a prefill filter, what each layer behind it holds is scaled, and the filter with it, so
      that nothing goes on that no layer holds. Layers before it that keep all vision tokens go on
      to do so (the filter needs them there): they set the floor.
    - An allocator is asked again, at the budget's mean share.
    - Smaller pictures stay as they are, and the rest is scaled; but where all their tokens are kept in all
      layers, it is the pictures that are scaled: `pictures.share` is the largest that fits.

    A policy that is at the budget already comes back unchanged. One that drops so much text that
    it holds less than the budget with all vision tokens stays below it.

    Args:
        budget: prompt KV live after prefill over dense, in [0, 1], counted over `prompts`.
        evidence: for allocators that look at more than the number of layers.

    Raises:
        OverBudgetError: nothing that may be scaled is left, and the rest is still above.
        UserError: the policy is for another number of layers, its allocator lacks evidence, or the budget
            holds all tokens of pictures that were to be made smaller.
    """
    check_unit("budget", budget)
    if not prompts:
        raise UserError("a budget needs at least one prompt to be counted on")
    if policy.pictures is not None and _keeps_all(policy):
        return _smaller(policy, policy.pictures, budget, prompts, layers)
    if policy.pictures is not None:
        shorter = [prompt.shrunk(policy.pictures) for prompt in prompts]
        scaled = scale_to(policy.of_cache, budget, shorter, layers, evidence)
        return scaled.model_copy(update={"pictures": policy.pictures})
    shaped = _allocated(policy, budget, prompts, layers, evidence)
    shaped.check_layers(layers)
    counted = Counter(prompts)
    dense = dense_tokens(prompts, layers)

    def used(candidate: Policy) -> float:
        stored = (times * _stored(candidate, shape, layers) for shape, times in counted.items())
        return sum(stored) / dense

    make, top = _joint(shaped, prompts, layers) if shaped.joint else _split(shaped, prompts, layers)
    if used(make(0)) > budget:
        raise OverBudgetError(policy, budget, used(make(0)))
    total = largest(lambda total: used(make(total)) <= budget, top)
    while total > 0 and live_share(make(total), prompts, layers) > budget:
        total -= 1  # sums of shares of tokens are rounded
    best = make(total)
    return shaped if used(best) <= used(shaped) <= budget else best


def _keeps_all(policy: Policy) -> bool:
    """Whether every token of the prompt stays in every layer, whatever its pictures."""
    keep = policy.vision_keep if isinstance(policy.vision_keep, tuple) else (policy.vision_keep,)
    drops = policy.joint or policy.prefill_filter or policy.allocator or policy.vision_compute is not None
    return not drops and min(keep) >= 1.0


def _smaller(
    policy: Policy, pictures: PicturePolicy, budget: float, prompts: Sequence[PromptShape], layers: int
) -> Policy:
    """The policy with the largest share of its pictures' tokens that fits."""

    def at(share: float) -> Policy:
        return policy.model_copy(update={"pictures": pictures.model_copy(update={"share": share})})

    def fits(share: float) -> bool:
        return live_share(at(share), prompts, layers) <= budget

    policy.check_layers(layers)
    least = 2.0**-HALVINGS
    if not fits(least):
        raise OverBudgetError(policy, budget, live_share(at(least), prompts, layers))
    if fits(1.0):
        raise UserError("all vision tokens fit as they are, so no picture is made smaller")
    return at(max(largest_share(fits, 0.0, 1.0, HALVINGS), least))


def _allocated(
    policy: Policy, budget: float, prompts: Sequence[PromptShape], layers: int, evidence: Evidence | None
) -> Policy:
    """The policy with one share a layer, as its allocator spreads the budget's mean."""
    if policy.allocator is None:
        return policy
    most = max(prompt.vision for prompt in prompts)
    known = evidence or Evidence(layers=layers, tokens=most, governed=prompts[0].governed)
    if policy.joint is not None:
        mean = policy.model_copy(update={"joint": policy.joint.model_copy(update={"keep": budget})})
        return resolve(mean, known)
    try:
        share = vision_share(prompts, layers, budget, policy.text, policy.vision_bits)
    except UserError:
        bare = policy.model_copy(update={"allocator": None, "vision_keep": 0.0, "vision_compute": None})
        raise OverBudgetError(policy, budget, live_share(bare, prompts, layers)) from None
    compute = policy.vision_compute
    if compute is not None and not isinstance(compute, tuple) and not isinstance(policy.vision_keep, tuple):
        compute = share * compute / policy.vision_keep if policy.vision_keep else 0.0
    return resolve(policy.model_copy(update={"vision_keep": share, "vision_compute": compute}), known)


def _joint(
    policy: Policy, prompts: Sequence[PromptShape], layers: int
) -> tuple[Callable[[int], Policy], int]:
    """Policies by the tokens that all layers hold together of the longest prompt, and the most."""
    assert policy.joint is not None
    pool, longest = policy.joint, max(prompt.tokens for prompt in prompts)
    own = counted_layers(prompts, layers)
    shares = [broadcast(pool.keep, layers)[layer] for layer in own]

    def make(total: int) -> Policy:
        counts = hand_out(shares, total, np.zeros(len(own), dtype=np.int64), np.full(len(own), longest))
        keep = in_place([ratio_of(int(count), longest) for count in counts], own, (1.0,) * layers)
        return policy.model_copy(update={"joint": pool.model_copy(update={"keep": keep})})

    return make, longest * len(own)


def _split(
    policy: Policy, prompts: Sequence[PromptShape], layers: int
) -> tuple[Callable[[int], Policy], int]:
    """Policies by the vision tokens that the scaled layers hold together of the largest picture."""
    largest = max(prompt.vision for prompt in prompts)
    keep, compute = policy.keep(layers), policy.compute(layers)
    shares = [min(share, _reaches(policy, layer)) for layer, share in enumerate(keep)]
    own = counted_layers(prompts, layers)
    whole = [bool(policy.prefill_filter) and share == 1.0 for share in shares]
    fixed = [stays or layer not in own for layer, stays in enumerate(whole)]
    caps = np.array([0 if stays else largest for stays in fixed])
    parts = [core / share if share else 1.0 for core, share in zip(compute, keep, strict=True)]
    parts = [part if layer in own else 1.0 for layer, part in enumerate(parts)]

    def make(total: int) -> Policy:
        counts = hand_out(shares, total, np.zeros(layers, dtype=np.int64), caps)
        ratios = (ratio_of(int(count), largest) for count in counts)
        new = tuple(1.0 if stays else ratio for ratio, stays in zip(ratios, fixed, strict=True))
        changed: dict[str, object] = {"vision_keep": new, "prefill_filter": _filter(policy, new, own)}
        if policy.vision_compute is not None:
            changed["vision_compute"] = tuple(
                _core(share, part, largest) for share, part in zip(new, parts, strict=True)
            )
        return policy.model_copy(update=changed)

    return make, int(caps.sum())


def _core(keep: float, part: float, largest: int) -> float:
    """`part` of the kept share, in whole tokens of the largest picture, and never above it."""
    return min(keep, ratio_of(tokens(keep * part, largest), largest))


def _reaches(policy: Policy, layer: int) -> float:
    """Share of the vision tokens that enter a layer."""
    return min([1.0, *(step.keep for step in policy.prefill_filter if step.after_layer <= layer)])


def _filter(policy: Policy, keep: Sequence[float], own: Sequence[int]) -> tuple[object, ...]:
    """The filter's steps, each letting through what a later layer holds at most."""

    def held(first: int) -> float:
        return max((keep[layer] for layer in own if layer >= first), default=1.0)

    return tuple(step.model_copy(update={"keep": held(step.after_layer)}) for step in policy.prefill_filter)


def _stored(policy: Policy, prompt: PromptShape, layers: int) -> float:
    return sum(size.live for size in sizes(policy, prompt, layers))
