"""Which tokens stay in a layer, which vision tokens form its core, and which go."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.column_sums import kernels_run
from avlprof.attention.modality import Modality
from avlprof.attention.ranking import best, best_pairs, best_slots
from avlprof.attention.weights import group_mean
from avlprof.runtime.layout import (
    CORE,
    PADDING,
    STORED,
    SYSTEM,
    TEXT,
    RowPlan,
    exchange,
    exchange_counted,
    left_order,
    per_row,
    swaps,
    text_order,
    whole_classes,
)
from avlprof.runtime.packed import StoredBits
from avlprof.runtime.text_part import TextPart
from avlprof.runtime.turns import TurnPrefill, text_scores

_CORE_TENSORS = ("vision", "core", "counts", "edges")


@dataclass(frozen=True)
class CoreSlots:
    """Where core and stored vision tokens lie in a layer's left part, the same until the next turn.

    `vision` and `core` are bool `[B, 1, n]` over its slots, `counts [B, 1, 1]` the sizes of the cores, and
    `edges [B, 3]` the slots where each row's vision and core begin and where both end.
    """

    vision: Tensor
    core: Tensor
    counts: Tensor
    edges: Tensor
    size: int
    exchanges: int
    even: bool

    @classmethod
    def of(
        cls, plans: list[RowPlan], classes: Tensor, bounds: tuple[int, int, bool] | None = None
    ) -> CoreSlots:
        """Of the `classes [B, 1, n]` of the slots; `bounds` as in `Extents.core`, else the least ones."""
        cores, device, left = [plan.core for plan in plans], classes.device, classes.shape[-1]
        exchanges = max(min(plan.core, plan.vision - plan.core) for plan in plans)
        size, most, even = bounds or (max(cores), exchanges, len(set(cores)) == 1)
        ends = [left - plan.system for plan in plans]
        begins = (
            [end - getattr(p, part) for end, p in zip(ends, plans, strict=True)]
            for part in ("vision", "core")
        )
        return cls(
            vision=(classes == STORED) | (classes == CORE),
            core=classes == CORE,
            counts=per_row(cores, device),
            edges=torch.cat([per_row(slots, device)[:, 0] for slots in (*begins, ends)], dim=-1),
            size=size,
            exchanges=most,
            even=even,
        )

    def copied(self) -> CoreSlots:
        """The same in tensors of its own."""
        return replace(self, **{name: getattr(self, name).clone() for name in _CORE_TENSORS})

    def refill(self, other: CoreSlots) -> None:
        """Become another layout of the same bounds, where the tensors lie."""
        for name in _CORE_TENSORS:
            getattr(self, name).copy_(getattr(other, name))

    def best(self, weights: Tensor, positions: Tensor, groups: int) -> Tensor:
        """The vision slots that should be the core, bool `[B, groups, n]`; ties go to the lower position.

        Args:
            weights: `[B, H, m]` attention of the step to the last `m` slots, all vision slots among them; of
                heads, or their means over sets.
            positions: `[B, G, n]` logical, `G` being `groups` or more.
            groups: sets of tokens: 1, or one a KV head.
        """
        scores = group_mean(weights, groups)
        start = self.vision.shape[-1] - scores.shape[-1]
        chosen = best_slots(
            scores,
            self.vision[..., start:],
            self.counts,
            positions[:, :groups, start:],
            self.size,
            self.even,
        )
        return pad(chosen, (start, 0)) if start else chosen

    def refresh(
        self,
        weights: Tensor,
        start: int,
        buffers: tuple[Tensor, Tensor, Tensor],
        groups: int,
        fixed: bool,
        stored: StoredBits | None = None,
    ) -> None:
        """Make the best vision slots the core, in `groups` sets: exchange slots of all buffers.

        On CUDA two kernels choose, count on the device, and move what changes.

        Args:
            weights: `[B, G, m]` attention of the step to the last `m` slots of the left part.
            start: the first of these slots.
            buffers: keys, values and positions.
            groups: as in `best`.
            fixed: the host need not ask how many slots change; as many are exchanged as could.
            stored: what lies before the buffers' slots in few bits, and changes places with their core.
        """
        if stored is not None:
            own = buffers[2][..., : self.core.shape[-1] - stored.width]
            new = self.best(weights, torch.cat([stored.positions, own], dim=-1), groups)
            most = self.exchanges if fixed else int((self.core & ~new).sum(dim=-1).max())
            stored.exchange(self.core, new, buffers, most)
            return
        if kernels_run(weights):
            from avlprof.runtime.triton_exchange import triton_refresh

            scores = weights if weights.shape[1] == groups else group_mean(weights, groups)
            triton_refresh(buffers, scores, start, self.edges, self.exchanges)
            return
        self.exchange(self.best(weights, buffers[2][..., : self.core.shape[-1]], groups), buffers, fixed)

    def exchange(self, new: Tensor, buffers: tuple[Tensor, Tensor, Tensor], fixed: bool) -> None:
        """Make `new [B, groups, n]` the core; `fixed` as above."""
        if not fixed:
            exchange_counted(buffers, self.core, new)
            return
        first, second = swaps(self.core, new, self.exchanges)
        for buffer in buffers:
            exchange(buffer, first, second)


@dataclass(frozen=True)
class Candidates:
    """What competes for a layer's slots at a prompt or turn: its `n` held slots, then `N` new tokens.

    `turn` are the new tokens, `classes [B, 1 or G, n]` those of the held slots, whose text begins at slot
    `left`, and `positions [B, G, n + N]` are logical; `G` is 1, or the layer's KV heads. `apart`, bool
    `[B, 1, n + N]`, are system and text tokens that few bits store, and that compete for no slot.
    """

    turn: TurnPrefill
    classes: Tensor
    positions: Tensor
    left: int
    apart: Tensor | None = None

    @property
    def in_order(self) -> bool:
        """Whether positions ascend with the columns, padding aside: nothing need be sorted by them."""
        return self.turn.past == 0

    @property
    def system(self) -> Tensor:
        """bool `[B, 1, n + N]`: system text, which all stays."""
        return self._of(SYSTEM, Modality.SYSTEM)

    @property
    def text(self) -> Tensor:
        """bool `[B, 1, n + N]`: text and generated tokens."""
        return self._of(TEXT, Modality.TEXT)

    @property
    def text_counts(self) -> list[int]:
        """New text tokens of each row that compete."""
        return [0] * len(self.classes) if self.apart is not None else self.turn.text_counts

    def _of(self, code: int, modality: Modality) -> Tensor:
        held = self.classes[:, :1] == code  # heads differ in vision alone
        marked = torch.cat([held, (self.turn.modality == modality)[:, None]], dim=-1)
        return marked if self.apart is None else marked & ~self.apart


def kept_order(
    candidates: Candidates,
    scores: Tensor | None,
    groups: tuple[int, int],
    part: TextPart,
    plans: list[RowPlan],
    after: list[RowPlan],
    left: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Columns of all candidates in the order of the layer's slots, `[B, G, n]`, and running scores of text.

    What is in neither the left part nor the text part behind it goes. Where heads differ in their counts
    of vision tokens, these are in no slots: the third answer, bool `[B, G, n + N]`, says which stay. A
    first prompt whose text stays by its age is put into order by a kernel on CUDA.

    Args:
        scores: `[B, H, N]` of the new tokens by the policy's scorer; None for a prompt that stays whole.
        groups: sets of vision tokens, and of text tokens: 1, or one a KV head.
        part: the text part, the turn's tokens counted.
        plans: what each row keeps of the new tokens.
        after: what each row holds after the turn.
        left: slots of the left part.
    """
    turn = candidates.turn
    counts, cores = [plan.text for plan in after], [plan.core for plan in after]
    most, known = max(counts), None if candidates.in_order else candidates.positions
    if scores is None:
        classes = whole_classes(turn.modality)
        whole = torch.cat([left_order(classes, None, left), text_order(classes, None, most)], dim=-1)
        return whole, None, None
    by_vision = group_mean(scores, groups[0])
    parts = part.rule.policy.head_parts(part.rule.layer, groups[0])
    if candidates.in_order and part.by_age and kernels_run(scores) and parts is None:
        from avlprof.runtime.triton_layout import prompt_order

        modality = turn.modality
        if candidates.apart is not None:
            modality = modality.masked_fill(candidates.apart[:, 0], Modality.PAD)
        return prompt_order(by_vision, modality, after, candidates.text_counts, (left, most)), None, None
    vision = vision_choice(candidates, by_vision, [plan.vision for plan in plans], cores, parts)
    text, running = text_choice(candidates, group_mean(scores, groups[1]), part, plans, counts)
    classes = torch.where(candidates.system, SYSTEM, torch.where(text, TEXT, vision))
    classes = classes.expand(-1, candidates.positions.shape[1], -1)
    order = torch.cat([left_order(classes, known, left), text_order(classes, known, most)], dim=-1)
    return order, running, None if parts is None else vision == STORED


def vision_choice(
    candidates: Candidates,
    scores: Tensor,
    kept: list[int],
    cores: list[int],
    parts: tuple[float, ...] | None,
) -> Tensor:
    """STORED, CORE or else PADDING for each candidate, `[B, G, n + N]`.

    What is held stays; of the new vision tokens the best stay, and the core is picked among all.

    Args:
        scores: `[B, G, N]` of the new tokens.
        kept: new vision tokens that each row keeps.
        cores: each row's core after the turn.
        parts: as in `best_pairs`, where heads differ in their counts and there is no core; None elsewhere.
    """
    turn, old, groups, device = candidates.turn, candidates.classes, scores.shape[1], scores.device
    vision = (turn.modality == Modality.VISION)[:, None].expand_as(scores)
    counts = per_row(kept, device)[:, 0, 0]
    new = best(scores, vision, counts) if parts is None else best_pairs(scores, vision, counts, parts)
    if candidates.in_order and cores == kept and parts is None:
        return torch.where(new, CORE, PADDING)
    was = ((old == STORED) | (old == CORE)).expand(-1, groups, -1)
    stays = torch.cat([was, new], dim=-1)
    if parts is not None:
        return torch.where(stays, STORED, PADDING)
    if turn.past:
        scores = group_mean(turn.all_weights(turn.last_row[:, None])[:, :, 0], groups)
    positions = None if candidates.in_order else candidates.positions[:, :groups]
    core = best(scores, stays, per_row(cores, device)[:, 0, 0], positions)
    return torch.where(core, CORE, torch.where(stays, STORED, PADDING))


def text_choice(
    candidates: Candidates, scores: Tensor, part: TextPart, plans: list[RowPlan], counts: list[int]
) -> tuple[Tensor, Tensor | None]:
    """Which tokens stay as text, bool `[B, G, n + N]`, and the running scores of all, if there are any.

    Args:
        scores: `[B, G, N]` of the new tokens by the policy's scorer, for a joint pool.
        part: the text part, the turn's tokens counted.
        plans: what each row keeps of the new tokens.
        counts: text tokens that each row holds after the turn.
    """
    turn, rule, groups = candidates.turn, part.rule, scores.shape[1]
    text, positions = candidates.text.expand(-1, groups, -1), candidates.positions[:, :groups]
    was, new = text[..., : turn.past], text[..., turn.past :]
    joint = rule.policy.joint
    if joint is not None and not rule.evicts:
        # a pool that grows: what it holds stays, and the new tokens compete among themselves
        own = [plan.text for plan in plans]
        sinks = [0 if turn.past else plan.sink for plan in plans]
        newest = [min(joint.newest(n), n - s) for n, s in zip(own, sinks, strict=True)]
        fresh = None if candidates.in_order else positions[..., turn.past :]
        return torch.cat([was, choose(scores, new, fresh, own, sinks, newest)], -1), None
    # any other part: held and new tokens compete together, as they will at every step
    running = _running(candidates, scores, part, text)
    if candidates.in_order and counts == candidates.text_counts:  # all stay
        return text, running
    ranked = running
    if ranked is None:
        ranked = scores if joint is not None and not turn.past else positions.float()
    sinks = [min(rule.sink(pool), n) for pool, n in zip(part.pools, counts, strict=True)]
    newest = [min(n, c - s) for (_, n), c, s in zip(part.rooms(), counts, sinks, strict=True)]
    order = None if candidates.in_order else positions
    return choose(ranked, text, order, counts, sinks, newest), running


def _running(candidates: Candidates, scores: Tensor, part: TextPart, text: Tensor) -> Tensor | None:
    """Running scores `[B, G, n + N]` after the turn; None where age decides."""
    turn, rule = candidates.turn, part.rule
    if rule.running is None:
        return None
    if rule.policy.joint is not None and not turn.past:
        return scores  # a pool's first prompt: its scorer gives what later rows add to
    before = None
    if part.scores is not None:
        before = pad(part.scores[..., : turn.past - candidates.left], (candidates.left, 0))
    return text_scores(turn, rule, text[:, :1], before, scores.shape[1])


def choose(
    scores: Tensor,
    candidates: Tensor,
    positions: Tensor | None,
    counts: list[int],
    sinks: list[int],
    newest: list[int],
) -> Tensor:
    """Mark `counts` candidates of each row: its `sinks` first, its `newest`, and the best others.

    `scores`, `candidates` (bool) and `positions` are `[B, G, n]`; so is the answer. Positions are None
    where those of candidates ascend with the columns.
    """
    device = scores.device
    if positions is None:
        age = candidates.long().cumsum(dim=-1) - 1  # of candidates alone; of others it is not read
    else:
        ordered = positions.masked_fill(~candidates, torch.iinfo(positions.dtype).max)
        age = ordered.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    total = candidates.sum(dim=-1, keepdim=True)
    safe = (age < per_row(sinks, device)) | (age >= total - per_row(newest, device))
    ranked = scores.masked_fill(safe & candidates, float("inf"))
    return best(ranked, candidates, per_row(counts, device)[:, 0, 0], positions)
