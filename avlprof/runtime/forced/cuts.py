"""Known answers scored without routes: the rows behind a route's first one run again, all others stay.

A row is changed by a cut only if it is one of the route's, or comes behind one. So where a route begins
in the text behind the pictures, the keys and values of everything before it are those of the dense
prompt, and one forward over the rest of the prompt and the answer serves many cuts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall
from avlprof.attention.modality import Modality
from avlprof.attention.session import switched, with_cache
from avlprof.policy import DENSE
from avlprof.runtime.cuts import Cut, Route
from avlprof.runtime.forced.attention import ForcedRuntime
from avlprof.runtime.forced.packing import AnswerGroup, PackedRows, answer_groups, parts, runs
from avlprof.runtime.forced.prefill import Prefixes
from avlprof.runtime.forced.prompt import PromptLayer, Prompts
from avlprof.runtime.forced.rows import AnswerRows
from avlprof.runtime.forced.score import Head, closeness

_ROWS = 1024  # rows of a forward pass: as many cuts share one


@dataclass(frozen=True)
class Known:
    """Prompts with known answers, all in the order of `prefixes`.

    `ids` and `codes [B, N]` are the padded prompts' tokens and their map of `coded`; `windows` has the
    tokens that each layer's sliding window sees, None where it has none.
    """

    model: PreTrainedModel
    prefixes: Prefixes
    head: Head
    ids: Tensor
    codes: Tensor
    answers: list[list[int]]
    windows: list[int | None]

    def starts(self, source: str) -> Tensor:
        """Column `[B]` of the first row that looks from `source`; the last one where none does."""
        looking = Route(source, source).sources(self.codes)
        first = looking.int().argmax(dim=1)
        return torch.where(looking.any(dim=1), first, self.codes.shape[1] - 1)

    def serves(self, source: str) -> bool:
        """Whether what is before the rows of `source` never sees them, and no picture comes behind."""
        self.prefixes.prepare([DENSE])
        starts, columns = self.starts(source), torch.arange(self.codes.shape[1], device=self.codes.device)
        behind = columns >= starts[:, None]
        pictured = bool(((self.codes == Modality.VISION) & behind).any())
        return not pictured and bool((self.prefixes.causal_from <= starts).all())


class CutAnswers:
    """The rows of prompts and answers behind the first row of a source, under any number of cuts."""

    def __init__(self, known: Known, source: str) -> None:
        self.known = known
        self._starts = known.starts(source)
        self._kept = known.codes.shape[1] - self._starts  # rows of each prompt that run again
        device = known.codes.device
        tokens = [
            [*row[start:], *(answer or [0])]
            for row, start, answer in zip(
                known.ids.tolist(), self._starts.tolist(), known.answers, strict=True
            )
        ]
        longest = list(accumulate((len(row) - 1 for row in tokens), max))
        groups = [
            AnswerGroup.of(rows, [tokens[i] for i in rows], device) for rows in answer_groups(longest, _ROWS)
        ]
        self._passes = list(runs(groups, [group.tokens.numel() for group in groups], _ROWS))
        self._lengths = torch.tensor([len(answer) for answer in known.answers], device=device)
        self._dense: dict[int, Tensor] = {}

    def sums(self, cuts: Sequence[Cut]) -> Tensor:
        """`closeness` summed over the answers' tokens, `[3, P, B]` in the order of the prefixes."""
        known = self.known
        known.prefixes.prepare([DENSE])
        sums = torch.zeros((3, len(cuts), len(known.answers)), device=known.codes.device)
        for number, groups in enumerate(self._passes):
            scored = [self._scored(group) for group in groups]
            targets = torch.cat([g.targets[own] for g, own in zip(groups, scored, strict=True)])
            owners = torch.cat([self._rows(g)[own] for g, own in zip(groups, scored, strict=True)])
            if number not in self._dense:
                self._dense[number] = self._hidden([None], groups)[0]
            size = sum(int(group.real.sum()) for group in groups)
            for part in parts(range(len(cuts)), _ROWS // size):
                ours = self._hidden([cuts[i] for i in part], groups)
                close = closeness(known.head, self._dense[number], ours, targets)
                sums[:, part] = sums[:, part].index_add(2, owners, close)
        return sums

    def _rows(self, group: AnswerGroup) -> Tensor:
        """Row `[b, T]` of the batch that each token of a group is of."""
        rows = torch.arange(group.rows.start, group.rows.stop, device=group.real.device)
        return rows[:, None].expand_as(group.real)

    def _scored(self, group: AnswerGroup) -> Tensor:
        """bool `[b, T]`: which rows of a group are followed by a token of the answer."""
        steps = torch.arange(group.real.shape[1], device=group.real.device)
        first = (self._kept[group.rows] - 1)[:, None]
        return (steps >= first) & (steps < first + self._lengths[group.rows, None])

    def _hidden(self, cuts: Sequence[Cut | None], groups: Sequence[AnswerGroup]) -> Tensor:
        """Last hidden states `[P, R, D]` of the scored rows of groups."""
        known = self.known
        packed = PackedRows.of(groups, len(cuts))
        runtime = ForcedRuntime(packed, [self._attention(cuts, group) for group in groups])
        cache = runtime.new_cache()
        positions = [
            known.prefixes.positions(g.rows, g.real.shape[1]) - self._kept[g.rows, None] for g in groups
        ]
        with switched(known.model, runtime=runtime) as session, known.head.watched(short=True) as seen:
            session.adopt(cache, known.codes[:1].clamp(max=Modality.TEXT))
            known.model(
                input_ids=packed.packed([group.tokens for group in groups])[None],
                position_ids=packed.packed(positions).unsqueeze(-2),
                **with_cache(known.model, cache),
            )
        assert seen.rows is not None
        scored = torch.cat([self._scored(group)[group.real] for group in groups])
        return seen.rows[0][packed.order[:, scored]]

    def _attention(self, cuts: Sequence[Cut | None], group: AnswerGroup) -> CutAttention:
        prompts = self.known.prefixes.rows(DENSE, group.rows)
        codes, starts = self.known.codes[group.rows], self._starts[group.rows]
        steps = torch.arange(group.real.shape[1], device=codes.device)
        columns = starts[:, None] + steps  # of the padded prompt, and on into the answer
        inside = codes.gather(1, columns.clamp(max=codes.shape[1] - 1))
        own = inside.where(columns < codes.shape[1], torch.full_like(inside, Modality.GENERATED))
        return CutAttention(cuts, prompts, own, columns, self.known)


class CutAttention:
    """Attention of the rows of a group under `P` cuts (None: dense), of which each sees what is before it.

    `own` and `columns [b, T]` are the codes and columns of the rows.
    """

    def __init__(
        self, cuts: Sequence[Cut | None], prompts: Prompts, own: Tensor, columns: Tensor, known: Known
    ) -> None:
        self.cuts, self.prompts, self.length = cuts, prompts, known.codes.shape[1]
        self._own, self._columns, self._windows = own, columns, known.windows
        self._routes = {cut.route for cut in cuts if cut is not None}

    def attend(self, call: AttentionCall) -> Tensor:
        """Output `[b * P, T, H, D]` of every row."""
        prompt = self._before(self.prompts.layers[call.layer])
        rows = AnswerRows(call, prompt, len(self.cuts))
        closed = self._closed(call.layer, rows)
        outputs = []
        for block in rows.blocks(range(rows.steps)):
            logits = rows.logits(block)
            hidden = ~self._visible(prompt, block, self._windows[call.layer])[:, None, None, None]
            if closed is not None:
                hidden = hidden | (closed & self._cut(prompt, block)[:, None, :, None])
            logits.masked_fill_(hidden, float("-inf"))
            outputs.append(rows.mixed(rows.weights(logits)))
        return rows.joined(outputs)

    def _before(self, layer: PromptLayer) -> PromptLayer:
        """The columns of a prompt that stay as they are in one row at least."""
        count = int((layer.columns < self._columns[:, :1].max()).any(dim=0).sum())
        return PromptLayer(
            layer.key[:, :, :count],
            layer.value[:, :, :count],
            layer.modality[:, :count],
            layer.columns[:, :count],
        )

    def _visible(self, prompt: PromptLayer, block: range, window: int | None) -> Tensor:
        """bool `[b, R, n + T]`: what rows of a block see where nothing is cut."""
        there = (prompt.modality != Modality.PAD) & (prompt.columns < self._columns[:, :1])
        real = torch.cat([there, torch.ones_like(self._columns, dtype=torch.bool)], dim=1)
        columns = torch.cat([prompt.columns, self._columns], dim=1)
        age = self._columns[:, block.start : block.stop, None] - columns[:, None]
        seen = real[:, None] & (age >= 0)
        return seen if window is None else seen & (age < window)

    def _cut(self, prompt: PromptLayer, block: range) -> Tensor:
        """bool `[b, P, R, n + T]`: what the rows of a block would not see of each cut's route."""
        codes = torch.cat([prompt.modality.to(self._own.dtype), self._own], dim=1)
        mine = self._own[:, block.start : block.stop]
        itself = torch.arange(codes.shape[1], device=codes.device) - prompt.columns.shape[1]
        others = itself != torch.arange(block.start, block.stop, device=codes.device)[:, None]
        by_route = {
            route: route.sources(mine)[..., None] & route.targets(codes)[:, None] & others
            for route in self._routes
        }
        none = torch.zeros((*mine.shape, codes.shape[1]), dtype=torch.bool, device=codes.device)
        return torch.stack([none if cut is None else by_route[cut.route] for cut in self.cuts], dim=1)

    def _closed(self, layer: int, rows: AnswerRows) -> Tensor | None:
        """bool `[1, Hkv, P, g, 1, 1]`: the heads for which each cut closes its route here; None: for none."""
        groups, size = rows.query.shape[1], rows.query.shape[3]
        none = torch.zeros(groups * size, dtype=torch.bool)
        heads = torch.stack(
            [none if cut is None or layer not in cut.layers else cut.closed(len(none)) for cut in self.cuts]
        )
        if not bool(heads.any()):
            return None
        if torch.equal(heads.all(dim=1), heads.any(dim=1)):  # whole layers: one mask for all heads
            return heads[None, None, :, :1, None, None].to(rows.query.device)
        closed = heads.view(len(self.cuts), groups, size).transpose(0, 1)
        return closed[None, ..., None, None].to(rows.query.device)
