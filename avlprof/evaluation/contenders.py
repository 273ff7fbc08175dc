"""Who is compared: the policies asked for, and baselines at the bytes of each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from avlprof.allocators import meet_budget, meet_read_budget
from avlprof.errors import UserError
from avlprof.policy import DENSE, Policy, PromptShape, ScorerSpec, TextPolicy, live_share, read_share, sizes

RANDOM_SEEDS = (0, 1, 2)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    `runs` are what is generated for it: one policy, several seeds of a random one (averaged per
    sample), or None, the stock model. `family` joins contenders of one kind in a figure.
    """

    label: str
    family: str
    runs: tuple[Policy | None, ...]


REFERENCE = Contender("dense", "dense", (None,))


def contenders(policies: Iterable[Policy]) -> list[Contender]:
    """The reference first, then each policy once; labels are made unique.

    A policy that ranks by `random` without a seed of its own runs with seeds 0, 1 and 2. A policy
    without any effect is the reference and gets no row of its own.
    """
    found = [REFERENCE]
    hashes = {DENSE.hash}
    for policy in policies:
        if policy.hash not in hashes:
            hashes.add(policy.hash)
            found.append(_contender(policy, policy.name, policy.name))
    return _unique(found)


def with_baselines(
    found: Sequence[Contender], prompts: Sequence[PromptShape], layers: int, answer_tokens: int
) -> list[Contender]:
    """Contenders and, behind them, `uniform` and `random` at equal live and read bytes.

    A baseline that does to these prompts what another contender does is left out.
    """
    shapes = set(prompts)
    known = [_effect(contender, shapes, layers) for contender in found]
    added = []
    for contender in found:
        policy = contender.runs[0]
        if policy is None:
            continue
        share = live_share(policy, prompts, layers)
        for baseline in equal_bytes(policy, prompts, layers, answer_tokens):
            contender = _contender(baseline, f"{baseline.name} @ {share:.1%}", baseline.name)
            effect = _effect(contender, shapes, layers)
            if effect not in known:
                known.append(effect)
                added.append(contender)
    return _unique([*found, *added])


def equal_bytes(
    policy: Policy, prompts: Sequence[PromptShape], layers: int, answer_tokens: int
) -> list[Policy]:
    """`uniform` and `random` with the live bytes and the read bytes of `policy`, never above.

    They share the policy's text part, refreshes and, uniform only, its scorer; a core that
    is refreshed is re-picked by attention in both. What the policy is already is left out; so is
    everything, with a warning, where a joint pool keeps less than the prompt's text alone needs.
    Counts are exact over `prompts`, to one token, with `answer_tokens` decoding steps.
    """
    joint = policy.joint is not None
    text = TextPolicy() if joint else policy.text
    scorer = ScorerSpec() if joint or policy.scorer.name == "random" else policy.scorer
    flat = (1.0,) * layers
    try:
        keep = meet_budget(flat, prompts, live_share(policy, prompts, layers), text)
        uniform = Policy(name="uniform", vision_keep=keep, scorer=scorer, heads=policy.heads, text=text)
        if not joint and policy.compute(layers) != policy.keep(layers):
            reads = read_share(policy, prompts, layers, answer_tokens)
            every, refresh = policy.refresh_interval, policy.refresh
            compute = meet_read_budget(
                keep, prompts, every, reads, answer_tokens, text, flat, refresh=refresh
            )
            cored = {"vision_compute": compute, "refresh_interval": every, "refresh": refresh}
            uniform = uniform.model_copy(update=cored)
    except UserError as error:
        _log.warning("policy '%s' has no baselines at equal bytes: %s", policy.name, error)
        return []
    random = uniform.model_copy(update={"name": "random", "scorer": ScorerSpec(name="random")})
    ranked_at_random = policy.scorer.name == "random" and not joint
    found = [] if _is_flat(policy, layers) and not ranked_at_random else [uniform]
    return found if _is_flat(policy, layers) and ranked_at_random else [*found, random]


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


def _contender(policy: Policy, label: str, family: str) -> Contender:
    runs = seeded(policy)
    if len(runs) == 1:
        return Contender(label, family, runs)
    name, separator, rest = label.partition(" @ ")
    return Contender(f"{name} x{len(runs)}{separator}{rest}", family, runs)


def _effect(contender: Contender, shapes: Iterable[PromptShape], layers: int) -> object:
    """What a contender does to these prompts; equal for ratios that mean the same tokens."""
    policy = contender.runs[0]
    if policy is None:
        return None
    counts = {shape: tuple(sizes(policy, shape, layers)) for shape in shapes}
    has_core = any(size.core < size.vision for layer in counts.values() for size in layer)
    refresh = (policy.refresh_interval, policy.refresh) if has_core else (0, "full")
    return counts, refresh, policy.scorer, policy.heads, policy.text, policy.joint


def _is_flat(policy: Policy, layers: int) -> bool:
    return policy.joint is None and len(set(policy.keep(layers))) == len(set(policy.compute(layers))) == 1


def _unique(found: Sequence[Contender]) -> list[Contender]:
    taken: set[str] = set()
    named = []
    for contender in found:
        label, number = contender.label, 1
        while label in taken:
            number += 1
            label = f"{contender.label} ({number})"
        taken.add(label)
        named.append(replace(contender, label=label))
    return named
