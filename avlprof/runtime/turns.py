"""What a layer is handed with a prompt or a further turn: the new tokens, and those that it holds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.attention.ranking import prompt_scores
from avlprof.attention.weights import gather_rows, group_mean, row_weights
from avlprof.runtime.text_part import TextRule
from avlprof.scorers import Prefill

BLOCK = 128  # rows of a prompt scored at once


@dataclass(frozen=True)
class Turn(Prefill):
    """New tokens of a turn, with the `n` slots that the layer holds already (`n` 0: the first turn).

    The fields of `Prefill` speak of the new tokens alone, so a scorer ranks the new images of a
    turn like the first; its attention rows are normalised over the held tokens too. `past_key`
    is `[B, Hkv, n, D]`, `past_seen` bool `[B, G, N, n]`, what each new row sees of them.
    """

    past_key: Tensor | None = None
    past_seen: Tensor | None = None

    @classmethod
    def taken(
        cls, call: AttentionCall, modality: Tensor, positions: Tensor, held: Tensor, present: Tensor
    ) -> Turn:
        """The turn that a layer was handed.

        Args:
            call: its keys are those of the held slots, then the new ones; its mask has one row a
                new token and one column a logical position.
            modality: `[B, N]` of the new tokens.
            positions: `[B, 1, N]` logical positions of the new tokens.
            held: `[B, G, n]` logical positions of the held slots.
            present: bool `[B, 1, n]`, slots that hold a token.
        """
        past, new = held.shape[-1], positions.shape[-1]
        whole = call.mask is None or past + new == call.mask.shape[-1] == new
        mask = call.mask
        past_seen = present[:, :, None].expand(-1, held.shape[1], new, -1)
        if mask is not None and not whole:
            past_seen = past_seen & columns(mask, held)
            mask = columns(mask, positions)
        own = Prefill.of(call._replace(key=call.key[:, :, past:], value=call.value[:, :, past:]), modality)
        given = {field.name: getattr(own, field.name) for field in fields(own)} | {"mask": mask}
        return cls(**given, past_key=call.key[:, :, :past], past_seen=past_seen)

    @property
    def held(self) -> int:
        """Slots that the layer held before."""
        return 0 if self.past_key is None else self.past_key.shape[2]

    def visible(self, heads: int) -> Tensor | None:
        """Mask `[B, 1 or heads, N, n + N]` of the turn's attention; None leaves it to the kernel."""
        padded = bool((~self.valid).any()) if self.mask is None else True
        if not self.held and not padded:
            return None
        rows = torch.arange(self.query.shape[2], device=self.query.device)
        own = self._seen(rows.expand(self.query.shape[0], -1)).expand(self.query.shape[0], -1, len(rows), -1)
        if not self.held:
            return own
        assert self.past_seen is not None
        groups = self.past_seen.shape[1]
        seen = torch.cat([self.past_seen, own.expand(-1, groups, -1, -1)], dim=-1)
        return seen if groups == 1 else seen.repeat_interleave(heads // groups, dim=1)

    def weights(self, rows: Tensor) -> Tensor:
        """Attention weights `[B, H, R, N]` of the rows at `rows [B, R]` to the new tokens."""
        return self.all_weights(rows)[..., self.held :]

    def all_weights(self, rows: Tensor) -> Tensor:
        """The same to the held slots and the new tokens, `[B, H, R, n + N]`."""
        if not self.held:
            return Prefill.weights(self, rows)
        assert self.past_seen is not None
        assert self.past_key is not None
        index = rows[:, None, :, None].expand(-1, self.past_seen.shape[1], -1, self.held)
        past = self.past_seen.gather(2, index)
        own = self._seen(rows).expand(-1, past.shape[1], rows.shape[1], -1)
        seen = torch.cat([past, own], dim=-1)
        if seen.shape[1] > 1:
            seen = seen.repeat_interleave(self.query.shape[1] // seen.shape[1], dim=1)
        key = torch.cat([self.past_key, self.key], dim=2)
        return row_weights(gather_rows(self.query, rows), key, self.scaling, seen, self.softcap)

    def row(self, index: int) -> Turn:
        """One row of the batch as a batch of its own."""
        part = slice(index, index + 1)
        cut = {}
        for name in ("query", "key", "value", "modality", "past_key", "past_seen", "mask"):
            tensor = getattr(self, name)
            if tensor is not None:
                cut[name] = tensor if name == "mask" and tensor.shape[0] == 1 else tensor[part]
        return replace(self, **cut)


def columns(mask: Tensor, positions: Tensor) -> Tensor:
    """Columns of `mask [B or 1, 1, q, kv]` at `positions [B, G, n]` (clamped): `[B, G, q, n]`."""
    batch, groups, n = positions.shape
    whole = mask.expand(batch, groups, -1, -1)
    index = positions.clamp(min=0)[:, :, None].expand(batch, groups, mask.shape[2], n)
    return whole.gather(3, index)


def text_scores(turn: Turn, rule: TextRule, text: Tensor, held: Tensor | None, groups: int) -> Tensor:
    """Running scores `[B, groups, n + N]` after a turn's rows; 0 where there is no competing token.

    Args:
        text: bool `[B, 1, n + N]`, the competing tokens: slots that are held, then new ones.
        held: `[B, groups, n]` scores so far.
    """
    kind = rule.running
    assert kind is not None
    batch, _, width = text.shape
    scores = turn.key.new_zeros((batch, groups, width), dtype=torch.float32)
    for index in range(batch):
        one, places = turn.row(index), text[index, 0].nonzero()[:, 0]
        first = int((places < turn.held).sum())
        found = scores.new_zeros((groups, len(places)))
        if held is not None and kind != "last_query":
            found[:, :first] = held[index][:, places[:first]]
        rows = places[first:] - turn.held
        if not len(rows):
            continue
        start = len(rows) - 1 if kind == "last_query" else 0
        for at in range(start, len(rows), BLOCK):
            block = rows[at : at + BLOCK]
            weights = group_mean(one.all_weights(block[None]), groups)[0][..., places]
            if kind == "accumulated" and rule.policy.joint is not None:
                gained = weights.sum(dim=-2)  # where rows look at later tokens, these are seen too
            else:
                gained = prompt_scores(kind, weights, rule.deleted, first + at)
            found = gained if kind == "last_query" else found + gained
        scores[index][:, places] = found
    return scores
