"""Who is compared at equal bytes: policies asked for, their baselines, and methods at budgets."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from avlprof.allocators._base import Evidence
from avlprof.budgets import OverBudgetError, ReadBudget, meet_both, meet_budget, scale_to
from avlprof.errors import UserError
from avlprof.models.smaller import SamplePictures
from avlprof.policy import (
    DENSE,
    FULL,
    RANKING,
    REFRESHES,
    PicturePolicy,
    Policy,
    PromptShape,
    ScorerSpec,
    TextPolicy,
    counted_layers,
    find_policy,
    live_share,
    read_share,
    shipped,
    sizes,
)
from avlprof.runtime.support import check_supported

RANDOM_SEEDS = (0, 1, 2)

POOLED, RESIZED = "pooled", "smaller-picture"
_FOUR: Final = Policy(vision_bits=4, text=TextPolicy(bits=4))
SMALLER: Final[tuple[Policy, ...]] = tuple(
    policy.model_copy(update={"name": name + end, "pictures": PicturePolicy(kind=kind)})
    for name, kind in ((POOLED, "pooled"), (RESIZED, "resized"))
    for end, policy in (("", Policy()), ("-4", _FOUR))
)
"""Baselines that keep all tokens of smaller pictures, in 16 bits and with the whole prompt in 4: scaled to a
budget, they say how much smaller."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyRow:
    """One row of an evaluation.

    `runs` are what is generated for it: one policy, several seeds of a random one (averaged per
    sample), or None, the stock model. `family` joins rows of one kind in a figure.
    """

    label: str
    family: str
    runs: tuple[Policy | None, ...]


REFERENCE = PolicyRow("dense", "dense", (None,))


def policy_rows(policies: Iterable[Policy]) -> list[PolicyRow]:
    """The reference first, then each policy once; labels are made unique.

    A policy that ranks by `random` without a seed of its own runs with seeds 0, 1 and 2. A policy
    without any effect is the reference and gets no row of its own.
    """
    rows = [REFERENCE]
    hashes = {DENSE.hash}
    for policy in policies:
        if policy.hash not in hashes:
            hashes.add(policy.hash)
            rows.append(_row(policy, policy.name, policy.name))
    return _unique(rows)


def with_baselines(
    rows: Sequence[PolicyRow], prompts: Sequence[PromptShape], layers: int, answer_tokens: int
) -> list[PolicyRow]:
    """The rows and, behind them, `uniform` and `random` at equal live and read bytes.

    A baseline that does to these prompts what another row does is left out.
    """
    shapes = set(prompts)
    known = [_effect(row, shapes, layers) for row in rows]
    added = []
    for row in rows:
        policy = row.runs[0]
        if policy is None:
            continue
        share = live_share(policy, prompts, layers)
        for baseline in equal_bytes(policy, prompts, layers, answer_tokens):
            other = _row(baseline, f"{baseline.name} @ {share:.1%}", baseline.name)
            effect = _effect(other, shapes, layers)
            if effect not in known:
                known.append(effect)
                added.append(other)
    return _unique([*rows, *added])


def equal_bytes(
    policy: Policy, prompts: Sequence[PromptShape], layers: int, answer_tokens: int
) -> list[Policy]:
    """`uniform` and `random` with the live bytes and the read bytes of `policy`, never above.

    They share the policy's text part, refreshes, bits of stored vision and, uniform only, its scorer
    (`RANKING` where it has none of its own: a joint pool, or one that ranks by `random`); a core that is
    refreshed is re-picked by attention in both. They cut the pictures as they are. What the policy is
    already is left out; so is everything, with a warning, where a joint pool keeps less than the prompt's
    text alone needs.
    Counts are exact over `prompts`, to one token, with `answer_tokens` decoding steps.
    """
    joint = policy.joint is not None
    text = TextPolicy() if joint else policy.text
    own = not joint and policy.scorer.name != "random"
    scorer = policy.scorer if own else ScorerSpec.of(RANKING)
    flat, memory = (1.0,) * layers, live_share(policy, prompts, layers)
    cored = not joint and policy.compute(layers) != policy.keep(layers)
    bits = policy.vision_bits if cored or policy.vision_compute is None else FULL
    uniform = Policy(name="uniform", vision_bits=bits, scorer=scorer, heads=policy.heads, text=text)
    try:
        if cored:
            share = read_share(policy, prompts, layers, answer_tokens)
            reads = ReadBudget.of(policy, share, answer_tokens)
            keep, compute = meet_both(flat, prompts, memory, reads, text, bits=bits, follow=lambda keep: flat)
            shares = {name: getattr(policy, name) for name in REFRESHES} | {"vision_compute": compute}
        else:
            keep, shares = meet_budget(flat, prompts, memory, text, bits=bits), {}
        uniform = uniform.model_copy(update={"vision_keep": keep} | shares)
    except UserError as error:
        _log.warning("policy '%s' has no baselines at equal bytes: %s", policy.name, error)
        return []
    random = uniform.model_copy(update={"name": "random", "scorer": ScorerSpec(name="random")})
    ranked_at_random = policy.scorer.name == "random" and not joint
    flat_already = not policy.shrinks and _is_flat(policy, counted_layers(prompts, layers), layers)
    baselines = [] if flat_already and not ranked_at_random else [uniform]
    return baselines if flat_already and ranked_at_random else [*baselines, random]


def seeded(policy: Policy) -> tuple[Policy, ...]:
    """What is generated for a policy: itself, or three seeds of one that ranks by `random` without one."""
    if policy.scorer.name != "random" or "seed" in policy.scorer.options:
        return (policy,)
    return tuple(
        policy.model_copy(
            update={"scorer": ScorerSpec(name="random", options=policy.scorer.options | {"seed": seed})}
        )
        for seed in RANDOM_SEEDS
    )


def _row(policy: Policy, label: str, family: str) -> PolicyRow:
    runs = seeded(policy)
    if len(runs) == 1:
        return PolicyRow(label, family, runs)
    name, separator, rest = label.partition(" @ ")
    return PolicyRow(f"{name} x{len(runs)}{separator}{rest}", family, runs)


def _effect(row: PolicyRow, shapes: Iterable[PromptShape], layers: int) -> object:
    """What a row's policy does to these prompts; equal for ratios that mean the same tokens."""
    policy = row.runs[0]
    if policy is None:
        return None
    counts = {shape: tuple(sizes(policy, shape, layers)) for shape in shapes}
    has_core = any(size.core < size.vision for layer in counts.values() for size in layer)
    refresh = tuple(getattr(policy, name) for name in REFRESHES) if has_core else ()
    heads = (policy.heads, policy.head_floor, policy.head_shares)
    pictures = policy.pictures if policy.shrinks else None
    return counts, refresh, policy.scorer, heads, policy.text, policy.joint, pictures


def _is_flat(policy: Policy, own: Sequence[int], layers: int) -> bool:
    """Whether a policy says the same of all layers that are counted."""
    keep, compute, bits = policy.keep(layers), policy.compute(layers), policy.bits(layers)
    return policy.joint is None and len({(keep[layer], compute[layer], bits[layer]) for layer in own}) == 1


def _unique(rows: Sequence[PolicyRow]) -> list[PolicyRow]:
    taken: set[str] = set()
    named = []
    for row in rows:
        label, number = row.label, 1
        while label in taken:
            number += 1
            label = f"{row.label} ({number})"
        taken.add(label)
        named.append(replace(row, label=label))
    return named


Kind = Literal["baseline", "given", "tuned"]


@dataclass(frozen=True)
class Entry:
    """A method at a budget; `policy` is its policy scaled to it."""

    method: str
    kind: Kind
    budget: float
    policy: Policy


@dataclass(frozen=True)
class LeftOut:
    """A method that is not compared at a budget, why, and the least share that it can hold (or NaN)."""

    method: str
    kind: Kind
    budget: float
    reason: str
    floor: float


@dataclass(frozen=True)
class LineUp:
    """Everything that was asked for: what is compared, and what is left out."""

    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]

    def at(self, budget: float, *kinds: Kind) -> list[Entry]:
        """Entries of a budget, of these kinds or of all."""
        return [e for e in self.entries if e.budget == budget and (not kinds or e.kind in kinds)]


def line_up(
    budgets: Sequence[float],
    prompts: Sequence[PromptShape],
    layers: int,
    *,
    baselines: Sequence[Policy],
    given: Sequence[Policy] = (),
    tuned: Sequence[Policy] = (),
    evidence: Callable[[], Evidence] | None = None,
    pictures: SamplePictures | None = None,
) -> LineUp:
    """All methods at all budgets.

    Baselines and given policies are scaled to each budget (`scale_to`). A tuned policy stands at
    the budget that its provenance names, and at no other.

    Args:
        evidence: gives what the profile of a traced run knows; asked only when an allocator needs it.
        pictures: those of the prompts, for policies that make them smaller.

    Raises:
        UserError: two methods share a name, or nothing can be compared at any budget.
    """
    methods: list[tuple[Kind, Policy]] = [
        *(("baseline", policy) for policy in baselines),
        *(("given", policy) for policy in given),
        *(("tuned", policy) for policy in tuned),
    ]
    _check_names(methods)
    asks = any(policy.allocator for _, policy in methods)
    known = evidence() if evidence and asks else None
    entries: list[Entry] = []
    left_out: list[LeftOut] = []
    for budget in budgets:
        for kind, policy in methods:
            own = _own_budget(policy)
            if kind == "tuned" and own is not None and not math.isclose(own, budget, abs_tol=1e-6):
                left_out.append(LeftOut(policy.name, kind, budget, f"was tuned at {own:g}", math.nan))
                continue
            try:
                own_prompts = counted_with(policy, prompts, pictures)
                scaled = scale_to(policy, budget, own_prompts, layers, known)
                check_supported(scaled)
            except UserError as error:
                floor = error.floor if isinstance(error, OverBudgetError) else math.nan
                left_out.append(LeftOut(policy.name, kind, budget, str(error), floor))
            else:
                entries.append(Entry(policy.name, kind, budget, scaled))
    if not entries:
        raise UserError(
            f"nothing can be compared: {left_out[0].reason}" if left_out else "no policy is given"
        )
    return LineUp(tuple(entries), tuple(left_out))


def counted_with(
    policy: Policy, prompts: Sequence[PromptShape], pictures: SamplePictures | None
) -> Sequence[PromptShape]:
    """The prompts as a policy is counted on: with the grids of their pictures, if it makes these smaller.

    Raises:
        UserError: pictures of this family cannot be made smaller so, or a prompt shows a video.
    """
    if policy.pictures is None or pictures is None:
        return prompts
    return pictures.on(prompts, policy.pictures.kind)


def _own_budget(policy: Policy) -> float | None:
    """The budget that a policy was tuned at, as its provenance says."""
    return policy.provenance.budget if policy.provenance else None


def all_baselines(policies: Iterable[Policy] = ()) -> list[Policy]:
    """The baselines that ship and `SMALLER`, less those that share their name with one of `policies`."""
    taken = {policy.name for policy in policies}
    return [policy for policy in (*shipped_baselines(), *SMALLER) if policy.name not in taken]


def shipped_baselines() -> list[Policy]:
    """The baselines that ship as policies."""
    return [find_policy(name) for name in shipped() if "/" not in name]  # others are of papers or models


def _check_names(methods: Sequence[tuple[Kind, Policy]]) -> None:
    """A name is one line of the figure, so only policies tuned at different budgets may share it."""
    taken: set[tuple[str, float | None]] = set()
    for kind, policy in methods:
        budget = _own_budget(policy) if kind == "tuned" else None
        if (policy.name, budget) in taken or (policy.name, None) in taken:
            raise UserError(f"two policies are named '{policy.name}'; change the field name of one")
        taken.add((policy.name, budget))
