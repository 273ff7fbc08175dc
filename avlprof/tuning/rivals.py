"""Who a tuned policy must beat: hand-set policies at its live and read bytes.

`avlprof.evaluation.lineup` says what equal bytes are; here stand the rivals that only a search has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from avlprof.allocators import Evidence
from avlprof.bisection import largest_share
from avlprof.budgets import scale_to
from avlprof.errors import UserError
from avlprof.evaluation import equal_bytes
from avlprof.evaluation.lineup import POOLED, RESIZED, SMALLER, counted_with
from avlprof.models.smaller import SamplePictures
from avlprof.policy import (
    FULL,
    HEAD_FLOOR,
    RANKING,
    Heads,
    Policy,
    PromptShape,
    ScorerSpec,
    live_share,
    load_policy,
    read_share,
    shipped,
)
from avlprof.runtime.support import unsupported
from avlprof.tuning.candidate import Budget, spread

ROW = "last_query"
"""A-VL's own ranking, by the last row of the prompt."""

UNIFORM, SAME, RANDOM, STATIC = "uniform", "uniform, same scorer", "random", "static core"
SIXTEEN = "uniform, same scorer, 16 bits"
SAME_WHOLE = "uniform, whole pictures"
LAST = f"uniform, {ROW}"
FOLDER = "baselines"


def rivals(winner: Policy, budget: Budget, layers: int) -> list[Policy]:
    """The rivals of every proof, at the winner's bytes, without those that do what the winner does.

    `uniform` ranks as the shipped policy of that name does (`RANKING`, one set a layer), `uniform,
    same scorer` as the winner does, with its bits and with 16, `uniform, last_query` as A-VL does; all have
    the winner's text and refreshes, and 16 bits but for the second, text included. None has heads of the
    winner's shares: they are as even as its layers. `random` ranks by
    chance. Where reads are limited, `static core` spreads memory and reads evenly and never re-picks its
    core. Where the winner makes pictures smaller, so does `uniform, same scorer`, and `uniform, whole
    pictures` is the same without; the others have them as they are too.
    """
    whole = winner
    if winner.shrinks:
        budget = _used(winner, budget, layers)
        compute = winner.compute(layers)
        whole = spread(winner.of_cache, winner.keep(layers), budget, follow=lambda keep: compute)
    even, full = _evened(whole), in_full(_evened(whole), budget, layers)
    shared = _with_heads(full, "shared")
    plain, row = (shared.model_copy(update={"scorer": ScorerSpec.of(name)}) for name in (RANKING, ROW))
    random = equal_bytes(full, budget.prompts, layers, budget.answer_tokens)
    named = [
        (UNIFORM, _flat(plain, budget, layers)),
        (SAME, _flat(_evened(winner), budget, layers)),
        *([(SAME_WHOLE, _flat(even, budget, layers))] if winner.shrinks else []),
        (SIXTEEN, _flat(full, budget, layers)),
        (LAST, _flat(row, budget, layers)),
        *((RANDOM, policy) for policy in random if policy.name == RANDOM),
    ]
    if budget.read is not None:
        named.append((STATIC, static_core(whole, budget, layers)))
    hashes = {winner.hash}
    others = []
    for name, policy in named:
        if policy.hash not in hashes:
            hashes.add(policy.hash)
            others.append(policy.model_copy(update={"name": name}))
    return others


def _flat(policy: Policy, budget: Budget, layers: int) -> Policy:
    """The flat split at a policy's bytes, with its pictures; the policy itself where it is one."""
    prompts = budget.shrunk(policy.pictures).prompts
    known = equal_bytes(policy.of_cache, prompts, layers, budget.answer_tokens)
    found = next((other for other in known if other.name == UNIFORM), policy)
    return found.model_copy(update={"pictures": policy.pictures})


def _evened(policy: Policy) -> Policy:
    """The policy with heads as even as its layers will be."""
    return policy if policy.head_shares is None else _with_heads(policy, "kv_head")


def _with_heads(policy: Policy, heads: Heads) -> Policy:
    """The policy with sets of this kind, which do not differ in their counts."""
    return policy.model_copy(update={"heads": heads, "head_floor": HEAD_FLOOR, "head_shares": None})


def static_core(winner: Policy, budget: Budget, layers: int) -> Policy:
    """The winner's memory and reads spread evenly, its scorer, and a core that is never re-picked.

    All text stays where the winner keeps all; else its window is the winner's.
    """
    even = Policy(
        name=STATIC,
        vision_bits=winner.vision_bits,
        scorer=winner.scorer,
        heads=winner.heads,
        text=winner.text,
    )
    return spread(even, (1.0,) * layers, _used(winner, budget, layers), follow=lambda keep: (1.0,) * layers)


def in_full(winner: Policy, budget: Budget, layers: int) -> Policy:
    """The winner's spread over layers with 16 bits at its bytes: what it gains by fewer bits is the rest.

    Text keeps its bits where system and text in 16 need more than the winner does.
    """
    if not (winner.packs or winner.text.packs):
        return winner
    text = winner.text.model_copy(update={"bits": FULL})
    refreshed = 0.0
    if winner.vision_compute is not None:
        refreshed = budget.refreshed(winner.refresh_interval, winner.refresh)
    if not _used(winner, budget, layers).affords(text, layers, refreshed):
        text = winner.text
    full = winner.model_copy(update={"vision_bits": FULL, "text": text})
    if winner.vision_compute is None:
        full = full.model_copy(update={"refresh_interval": 0, "refresh": "full"})
    compute = winner.compute(layers)
    return spread(full, winner.keep(layers), _used(winner, budget, layers), follow=lambda keep: compute)


def _used(winner: Policy, budget: Budget, layers: int) -> Budget:
    """What the winner uses of the budget."""
    prompts, steps = budget.prompts, budget.answer_tokens
    reads = None if budget.read is None else min(read_share(winner, prompts, layers, steps), budget.read)
    return replace(budget, memory=live_share(winner, prompts, layers), read=reads)


def shipped_rivals(
    winner: Policy, budget: Budget, evidence: Evidence, known: Sequence[Policy] = ()
) -> tuple[list[Policy], dict[str, str]]:
    """The shipped baselines at the winner's bytes, and why others cannot take part, by name.

    A baseline without two levels reads all it keeps, so where reads are limited it keeps no more
    than may be read: it then uses less memory than the winner. `known` are left out.
    """
    prompts, layers = budget.prompts, evidence.layers
    live = live_share(winner, prompts, layers)
    reads = read_share(winner, prompts, layers, budget.answer_tokens)
    hashes = {winner.hash, *(policy.hash for policy in known)}
    others, left_out = [], dict[str, str]()
    for label, path in shipped().items():
        if path.parent.name != FOLDER or label in (UNIFORM, RANDOM):
            continue
        policy = load_policy(path)
        if missing := unsupported(policy):
            left_out[label] = f"the runtime cannot run {missing}"
            continue
        try:
            scaled = _within(policy, live, reads, budget, evidence)
        except UserError as error:
            left_out[label] = str(error)
            continue
        if scaled.hash not in hashes:
            hashes.add(scaled.hash)
            others.append(scaled.model_copy(update={"name": label}))
    return others, left_out


def smaller_rivals(
    winner: Policy, budget: Budget, pictures: SamplePictures
) -> tuple[list[Policy], dict[str, str]]:
    """Pooled vision tokens and smaller pictures at the winner's bytes, and why one is left out, by name.

    They store what is left in the winner's bits and keep its text; where reads are limited they hold no
    more than may be read.
    """
    prompts, layers = budget.prompts, pictures.adapter.layers
    most = live_share(winner, prompts, layers)
    if budget.read is not None:
        most = min(most, read_share(winner, prompts, layers, budget.answer_tokens))
    others, left_out = [], dict[str, str]()
    for method in SMALLER:
        if method.name not in (POOLED, RESIZED):
            continue  # bits are the winner's
        try:
            own = method.model_copy(update={"vision_bits": winner.vision_bits, "text": winner.text})
            others.append(scale_to(own, most, counted_with(own, prompts, pictures), layers))
        except UserError as error:
            left_out[method.name] = str(error)
    return others, left_out


def _within(policy: Policy, live: float, reads: float, budget: Budget, evidence: Evidence) -> Policy:
    """The baseline at `live`; if it then reads too much, at the memory where it does not."""
    prompts, layers = budget.prompts, evidence.layers

    def at(share: float) -> Policy:
        return scale_to(policy, share, prompts, layers, evidence)

    def fits(share: float) -> bool:
        return read_share(at(share), prompts, layers, budget.answer_tokens) <= reads + _one_token(prompts)

    if budget.read is None or fits(live):
        return at(live)
    if not fits(reads):
        raise UserError(f"policy '{policy.name}' reads more than {reads:.3g} of the dense prompt KV per step")
    return at(largest_share(fits, reads, live, halvings=12))


def _one_token(prompts: Sequence[PromptShape]) -> float:
    """One token a layer and prompt, as a share of the dense prompt KV: the grain of a budget."""
    return len(prompts) / sum(prompt.total for prompt in prompts)
