"""What a layer is handed with a prompt or a further turn: the new tokens, and those that it holds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.attention.modality import Modality
from avlprof.attention.ranking import prompt_scores
from avlprof.attention.weights import gather_rows, group_mean, row_weights
from avlprof.runtime.text_part import TextRule
from avlprof.scorers import Prefill

BLOCK = 128  # rows of a prompt scored at once


@dataclass(frozen=True)
class TurnPrefill(Prefill):
    """New tokens of a turn, with the `n` slots that the layer holds already (`n` 0: the first turn).

    The fields of `Prefill` speak of the new tokens alone, so a scorer ranks the new images of a
    turn like the first; its attention rows are normalised over the held tokens too. `past_key`
    is `[B, Hkv, n, D]`, `past_positions [B, G, n]` are logical, and `past_seen` is bool `[B, G, N, n]`,
    what each new row sees of them. `texts` are the new text tokens of each row, where the host has
    counted them.
    """

    past_key: Tensor | None = None
    past_positions: Tensor | None = None
    past_seen: Tensor | None = None
    texts: tuple[int, ...] | None = None

    @classmethod
    def behind(
        cls, call: AttentionCall, modality: Tensor, positions: Tensor, before: Tensor, present: Tensor
    ) -> TurnPrefill:
        """The turn that a layer was handed, behind the slots that it holds.

        Args:
            call: its keys are those of the held slots, then the new ones; its mask has one row a
                new token and one column a logical position.
            modality: `[B, N]` of the new tokens.
            positions: `[B, 1, N]` logical positions of the new tokens.
            before: `[B, G, n]` logical positions of the held slots.
            present: bool `[B, 1, n]`, slots that hold a token.
        """
        past, new = before.shape[-1], positions.shape[-1]
        whole = call.mask is None or past + new == call.mask.shape[-1] == new
        mask = call.mask
        past_seen = present[:, :, None].expand(-1, before.shape[1], new, -1)
        if mask is not None and not whole:
            past_seen = past_seen & mask_columns(mask, before)
            mask = mask_columns(mask, positions)
        own = Prefill.of(call._replace(key=call.key[:, :, past:], value=call.value[:, :, past:]), modality)
        values = {field.name: getattr(own, field.name) for field in fields(own)} | {"mask": mask}
        return cls(**values, past_key=call.key[:, :, :past], past_positions=before, past_seen=past_seen)

    @property
    def past(self) -> int:
        """Slots that the layer held before."""
        return 0 if self.past_key is None else self.past_key.shape[2]

    def all_positions(self, positions: Tensor) -> Tensor:
        """Logical positions `[B, G, n + N]` of the held slots and the new tokens, `[B, 1, N]`."""
        if not self.past or self.past_positions is None:
            return positions
        groups = self.past_positions.shape[1]
        return torch.cat([self.past_positions, positions.expand(-1, groups, -1)], dim=-1)

    @property
    def text_counts(self) -> list[int]:
        """New text tokens of each row; waits for the device unless the host has counted them."""
        if self.texts is not None:
            return list(self.texts)
        counts: list[int] = (self.modality == Modality.TEXT).sum(dim=1).tolist()
        return counts

    def visible(self, heads: int) -> Tensor | None:
        """Mask `[B, 1 or heads, N, n + N]` of the turn's attention; None leaves it to the kernel."""
        padded = bool((~self.valid).any()) if self.mask is None else True
        if not self.past and not padded:
            return None
        rows = torch.arange(self.query.shape[2], device=self.query.device)
        own = self._seen(rows.expand(self.query.shape[0], -1)).expand(self.query.shape[0], -1, len(rows), -1)
        if not self.past:
            return own
        assert self.past_seen is not None
        groups = self.past_seen.shape[1]
        seen = torch.cat([self.past_seen, own.expand(-1, groups, -1, -1)], dim=-1)
        return seen if groups == 1 else seen.repeat_interleave(heads // groups, dim=1)

    def weights(self, rows: Tensor) -> Tensor:
        """Attention weights `[B, H, R, N]` of the rows at `rows [B, R]` to the new tokens."""
        return self.all_weights(rows)[..., self.past :]

    def all_weights(self, rows: Tensor) -> Tensor:
        """The same to the held slots and the new tokens, `[B, H, R, n + N]`."""
        if not self.past:
            return Prefill.weights(self, rows)
        assert self.past_seen is not None
        assert self.past_key is not None
        index = rows[:, None, :, None].expand(-1, self.past_seen.shape[1], -1, self.past)
        past = self.past_seen.gather(2, index)
        own = self._seen(rows).expand(-1, past.shape[1], rows.shape[1], -1)
        seen = torch.cat([past, own], dim=-1)
        if seen.shape[1] > 1:
            seen = seen.repeat_interleave(self.query.shape[1] // seen.shape[1], dim=1)
        key = torch.cat([self.past_key, self.key], dim=2)
        return row_weights(gather_rows(self.query, rows), key, self.scaling, seen, self.softcap, self.sinks)

    def row(self, index: int) -> TurnPrefill:
        """One row of the batch as a batch of its own."""
        part = slice(index, index + 1)
        cut = {}
        for name in ("query", "key", "value", "modality", "past_key", "past_positions", "past_seen", "mask"):
            tensor = getattr(self, name)
            if tensor is not None:
                cut[name] = tensor if name == "mask" and tensor.shape[0] == 1 else tensor[part]
        return replace(self, **cut)


def mask_columns(mask: Tensor, positions: Tensor) -> Tensor:
    """Columns of `mask [B or 1, 1, q, kv]` at `positions [B, G, n]` (clamped): `[B, G, q, n]`."""
    batch, groups, n = positions.shape
    whole = mask.expand(batch, groups, -1, -1)
    index = positions.clamp(min=0)[:, :, None].expand(batch, groups, mask.shape[2], n)
    return whole.gather(3, index)


def text_scores(
    turn: TurnPrefill, rule: TextRule, text: Tensor, before: Tensor | None, groups: int
) -> Tensor:
    """Running scores `[B, groups, n + N]` after a turn's rows; 0 where there is no competing token.

    Args:
        text: bool `[B, 1, n + N]`, the competing tokens: slots that are held, then new ones.
        before: `[B, groups, n]` scores so far.
    """
    kind = rule.running
    assert kind is not None
    batch, _, width = text.shape
    scores = turn.key.new_zeros((batch, groups, width), dtype=torch.float32)
    for index in range(batch):
        one, columns = turn.row(index), text[index, 0].nonzero()[:, 0]
        first = int((columns < turn.past).sum())
        sums = scores.new_zeros((groups, len(columns)))
        if before is not None and kind != "last_query":
            sums[:, :first] = before[index][:, columns[:first]]
        rows = columns[first:] - turn.past
        if not len(rows):
            continue
        start = len(rows) - 1 if kind == "last_query" else 0
        for at in range(start, len(rows), BLOCK):
            block = rows[at : at + BLOCK]
            weights = group_mean(one.all_weights(block[None]), groups)[0][..., columns]
            if kind == "accumulated" and rule.policy.joint is not None:
                gained = weights.sum(dim=-2)  # where rows look at later tokens, these are seen too
            else:
                gained = prompt_scores(kind, weights, rule.deleted, first + at)
            sums = gained if kind == "last_query" else sums + gained
        scores[index][:, columns] = sums
    return scores
