"""Policies packed into one batch of rows, in groups that share their work."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from avlprof.policy import REFRESHES, Policy, ScorerSpec


@dataclass(frozen=True)
class AnswerGroup:
    """Answers of similar length: `rows` of the batch in the order of lengths.

    `tokens [b, T]` are all but an answer's last token, `targets [b, T]` all but its first; `real
    [b, T]` marks what is not padding.
    """

    rows: slice
    tokens: Tensor
    targets: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: range, answers: Sequence[Sequence[int]], device: torch.device) -> AnswerGroup:
        """The group of the answers `rows` of a batch, each of 2 or more tokens."""
        width = max(len(answer) for answer in answers)
        padded = torch.tensor([[*answer, *[0] * (width - len(answer))] for answer in answers], device=device)
        lengths = torch.tensor([len(answer) for answer in answers], device=device)
        real = torch.arange(1, width, device=device) < lengths[:, None]
        return cls(slice(rows.start, rows.stop), padded[:, :-1], padded[:, 1:], real)


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of groups lie in one sequence of `R * P` tokens.

    `indices` has `[b * P, T]` a group, the index of each token (any where it is padding) with the P
    policies of a row side by side, and `real` which are no padding. `order [P, R]` is the index of every
    token of every policy, group by group and row by row.
    """

    indices: list[Tensor]
    real: list[Tensor]
    order: Tensor
    policies: int

    @classmethod
    def of(cls, groups: Sequence[AnswerGroup], policies: int) -> PackedRows:
        """Lay out groups for a number of policies."""
        indices, reals, order, begin = [], [], [], 0
        for group in groups:
            real = spread(group.real, policies)
            index = (begin - 1 + real.flatten().cumsum(0)).view_as(real).masked_fill(~real, begin)
            begin += int(group.real.sum()) * policies
            indices.append(index)
            reals.append(real)
            order.append(index.view(-1, policies, index.shape[1]).transpose(0, 1)[:, group.real])
        return cls(indices, reals, torch.cat(order, dim=1), policies)

    def packed(self, values: Sequence[Tensor]) -> Tensor:
        """One sequence `[..., R * P]` of values `[..., b, T]` a group, repeated for each policy."""
        return torch.cat(
            [spread(v, self.policies)[..., real] for v, real in zip(values, self.real, strict=True)], dim=-1
        )


def spread(values: Tensor, policies: int) -> Tensor:
    """`[..., b, T]` to `[..., b * P, T]`, the copies of a row side by side."""
    return values.repeat_interleave(policies, dim=-2)


T = TypeVar("T")
_PART = 24  # answer rows that take as long as the fixed cost of a part (embedded model, CPU)


def answer_groups(steps: Sequence[int], most: int) -> list[range]:
    """Parts of rows that are sorted by their number of steps; each part is padded to its longest.

    Chosen to need the fewest padded rows, a part having a price of its own, and at most `most` of them
    in a part of several rows. Rows without a step are left out.
    """
    begin = next((i for i, n in enumerate(steps) if n), len(steps))
    cost = {begin: 0}
    cut = {begin: begin}
    for stop in range(begin + 1, len(steps) + 1):
        sizes = {start: (stop - start) * steps[stop - 1] for start in range(begin, stop)}
        options = {
            start: cost[start] + _PART + size
            for start, size in sizes.items()
            if size <= most or start == stop - 1
        }
        cut[stop] = min(options, key=lambda start: options[start])
        cost[stop] = options[cut[stop]]
    groups, stop = [], len(steps)
    while stop > begin:
        groups.append(range(cut[stop], stop))
        stop = cut[stop]
    return groups[::-1]


def runs(things: Sequence[T], sizes: Sequence[int], most: int) -> Iterator[list[T]]:
    """Runs of things whose sizes sum to at most `most`, or of a single thing that is larger."""
    run: list[T] = []
    total = 0
    for thing, size in zip(things, sizes, strict=True):
        if run and total + size > most:
            yield run
            run, total = [], 0
        run.append(thing)
        total += size
    if run:
        yield run


def policy_groups(policies: Sequence[Policy]) -> list[list[int]]:
    """Indices of policies that differ in their shares of vision (or of a joint pool) and scorer alone."""
    kinds: dict[Hashable, list[int]] = {}
    for index, policy in enumerate(policies):
        kinds.setdefault(_kind(policy), []).append(index)
    return list(kinds.values())


def parts(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """`indices` in runs of at most `size`, of even lengths."""
    count = -(-len(indices) // max(size, 1))
    each = -(-len(indices) // count) if count else 1
    for start in range(0, len(indices), each):
        yield list(indices[start : start + each])


def prefix_key(policy: Policy) -> str:
    """Policies with one key see the same prefilled prompts; empty: the dense model's."""
    if not policy.prefill_filter:
        return ""
    steps = "/".join(f"{step.after_layer}:{step.keep!r}" for step in policy.prefill_filter)
    return f"{steps}/{policy.scorer.key}"


def keeps_all_vision(policy: Policy) -> bool:
    """Whether every vision token that a layer has is kept and attended to at every step."""
    shares = (policy.vision_keep, policy.vision_compute)
    return all(min(s if isinstance(s, tuple) else (s,)) >= 1.0 for s in shares if s is not None)


def scorers_of(policies: Sequence[Policy]) -> list[ScorerSpec]:
    """Scorers of policies that share a pass; none when all keep all vision tokens, or all go by age."""
    if not any(_ranks(policy) for policy in policies):
        return []
    return list({policy.scorer.key: policy.scorer for policy in policies}.values())


def _ranks(policy: Policy) -> bool:
    if policy.joint is not None:
        return policy.evicts_by != "position"
    return not keeps_all_vision(policy)


def _kind(policy: Policy) -> Hashable:
    joint = policy.joint.model_dump_json(exclude={"keep"}) if policy.joint else ""
    ranks_by = policy.scorer.name if policy.joint is not None else ""
    refresh: tuple[Hashable, ...] = ()
    if policy.picks:
        refresh = tuple(getattr(policy, name) for name in REFRESHES)
    text = policy.text.model_dump_json()
    bits = (policy.vision_bits, policy.vision_compute is None) if policy.packs else ()
    return (bits, text, joint, ranks_by, refresh, policy.heads, prefix_key(policy))
