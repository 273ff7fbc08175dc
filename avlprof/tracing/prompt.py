"""Which rows of a prompt are measured, and for what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.attention.weights import head_logits, softmax
from avlprof.tracing import statistics
from avlprof.tracing.columns import UNSEEN, Columns, row_values
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.statistics import history
from avlprof.tracing.sums import Sums, joined_sums

KINDS = {"system": Modality.SYSTEM, "vision": Modality.VISION, "text": Modality.TEXT}
RECEIVED = ("last", "instruction", "all")
LAST, INSTRUCTION, ALL = range(len(RECEIVED))
WORTH_A_BLOCK = 1 << 14  # weights a head that a further block must save
MOST_ROWS = 256  # of a block: longer ones would form many weights that no row may see


@dataclass(frozen=True)
class Block:
    """Rows of a prompt that are measured together.

    `rows [R]` ascend; `bins` is theirs as in `Columns`, `order` their number among the text tokens.
    `kinds [K, R]` is 1 where a row is of a kind; `covered [C]` indexes the rows that are measured
    for coverage and `covered_kinds [K, C]` tells their kinds; `received [3, R]` is 1 where a row
    counts for each of `RECEIVED`; `is_text` indexes the text rows, which are `texts` of the pass.
    `later [R, last - first]` is `UNSEEN` on keys that come after a row, 0 elsewhere, from the key
    behind `first` on: those before are seen by all. `first` and `last` are the bounds of the rows, on
    the host.
    """

    first: int
    last: int
    rows: Tensor
    order: Tensor
    bins: Tensor
    later: Tensor
    kinds: Tensor
    covered: Tensor
    covered_kinds: Tensor
    received: Tensor
    is_received: bool
    is_text: Tensor
    texts: slice


class MeasuredRows:
    """The rows of a prompt that are measured: once each, also where a row is of two kinds.

    Those of a further pass begin at `start`, behind what passed before.
    """

    def __init__(self, columns: Columns, start: int = 0) -> None:
        self.columns = columns
        options = self.options = columns.options
        new = columns.codes[start:]
        rows = {kind: (new == code).nonzero()[:, 0] + start for kind, code in KINDS.items()}
        if options.rows != "all":
            rows["vision"] = _spread(rows["vision"], options.vision_rows)
        rows["last"] = torch.tensor([columns.count - 1])
        self._by_kind = {kind: own for kind, own in rows.items() if len(own)}
        self.rows = torch.tensor(sorted({row for own in self._by_kind.values() for row in own.tolist()}))

    @property
    def kinds(self) -> dict[str, int]:
        """How many rows of each kind are measured; kinds without any are left out."""
        return {kind: len(rows) for kind, rows in self._by_kind.items()}

    @cached_property
    def marks(self) -> tuple[Tensor, Tensor, Tensor]:
        """On the host: bool `[K, R]` kinds and covered rows of each kind, and `[3, R]` received."""
        by_kind = self._by_kind.values()
        kinds = torch.stack([torch.isin(self.rows, rows) for rows in by_kind])
        sparse = [_spread(rows, self.options.coverage_rows) for rows in by_kind]
        covered = torch.stack([torch.isin(self.rows, rows) for rows in sparse])
        text = self.columns.codes[self.rows] == Modality.TEXT
        last = self.rows == self.columns.count - 1
        every = torch.full_like(last, self.options.rows == "all")
        return kinds, covered, torch.stack([last, text, every])

    def blocks(self, most: int) -> list[Block]:
        """The rows in blocks of at most `most`, made once."""
        known = self._known.get(most)
        if known is None:
            known = self._known[most] = [self._block(*bounds) for bounds in self._bounds(most)]
        return known

    @cached_property
    def _known(self) -> dict[int, list[Block]]:
        return {}

    def _bounds(self, most: int) -> list[tuple[int, int]]:
        """First and last row of each block.

        A block measures its rows against all keys up to its last row, so it ends early where the
        next rows see many more.
        """
        rows = self.rows.tolist()
        bounds, start = [], 0
        for i in range(1, len(rows) + 1):
            full = i == len(rows) or i - start >= most
            if full or (i - start) * (rows[min(i + most, len(rows)) - 1] - rows[i - 1]) >= WORTH_A_BLOCK:
                bounds.append((start, i))
                start = i
        return bounds

    def _block(self, start: int, stop: int) -> Block:
        device = self.columns.device
        kinds, covered, received = (marks[:, start:stop] for marks in self.marks)
        rows, before = self.rows[start:stop], int(self.marks[2][INSTRUCTION, :start].sum())
        first, last = int(rows[0]), int(rows[-1])
        chosen = covered.any(dim=0).nonzero()[:, 0]

        def there(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.to(device, dtype, non_blocking=True)

        return Block(
            first=first,
            last=last,
            rows=there(rows, torch.long),
            bins=self.columns.bins(rows),
            later=there((torch.arange(first + 1, last + 1) > rows[:, None]) * UNSEEN, torch.float32),
            order=there(self.columns.order[rows], torch.long),
            kinds=there(kinds, torch.float64),
            covered=there(chosen, torch.long),
            covered_kinds=there(covered[:, chosen], torch.float64),
            received=there(received, torch.float32),
            is_received=bool(received.any()),
            is_text=there(received[1].nonzero()[:, 0], torch.long),
            texts=slice(before, before + int(received[1].sum())),
        )


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` evenly spaced entries, first and last included."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


CPU_BLOCK = 1 << 19  # weights that stay in a core's cache
DEVICE_BLOCK = 1 << 22  # and few launches


@dataclass(frozen=True)
class PromptAttention:
    """What one row of a batch attended with, padding left out.

    `query [H, R, D]` and `key [Hkv, N, D]` are post-RoPE, the queries those of the last R of N tokens:
    all of a prompt, fewer of a further pass. `mask` is bool `[R, N]` or `[H, R, N]`, or None where all N
    attended and attention was causal, or (`causal` False) whole. `sinks [H]` are learned logits, if
    there are any.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    mask: Tensor | None
    causal: bool
    sinks: Tensor | None = None

    @property
    def before(self) -> int:
        """Keys in front of those of the first query."""
        return self.key.shape[1] - self.query.shape[1]


@dataclass
class PromptSums:
    """Sums over the rows: `received` fp32 `[H, 3, V]`, what each vision token got from `RECEIVED`;
    `history` fp64 `[H, T]`, and `texts` fp32 `[H, T, V]`, what each text row gave, where they were asked
    for. Without `per_head` H is 1, the mean over heads.

    With `columns`, on the host, `received [H, 3, N]` is of all tokens, and these are vision's.
    """

    sums: Sums
    received: Tensor
    history: Tensor | None
    columns: Tensor | None = None
    texts: Tensor | None = None


def measure_prompt(attention: PromptAttention, plan: MeasuredRows) -> PromptSums:
    """Measure the rows of a plan in one pass.

    Weights exist for some rows of some KV groups at a time, and for the keys that these rows may
    see. Nothing here waits for a device.
    """
    heads, (groups, length, _) = len(attention.query), attention.key.shape
    size, device = heads // groups, attention.key.device
    budget = plan.options.block or (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK)
    kept = heads if plan.options.per_head else 1
    shape = (kept, len(RECEIVED), len(plan.columns.vision))
    total = PromptSums(Sums(plan.kinds), torch.zeros(shape, dtype=torch.float32, device=device), None)
    if plan.options.history is not None:
        total.history = torch.zeros(kept, len(plan.columns.text), dtype=torch.float64, device=device)
    if plan.options.text_rows:
        texts = plan.kinds.get("text", 0)
        total.texts = torch.zeros(kept, texts, shape[-1], dtype=torch.float32, device=device)
    for block in plan.blocks(min(max(budget // (length * size), 1), MOST_ROWS)):
        seen = block.last + 1 if attention.mask is None and attention.causal else length
        together = max(budget // (len(block.rows) * seen * size), 1)
        for start in range(0, groups, together):
            _measure(total, attention, plan, block, seen, slice(start, min(start + together, groups)))
    if not plan.options.per_head:
        for added in (total.received, total.history, total.texts):
            if added is not None:
                added /= heads
    return total


def joined(before: PromptSums | None, latest: PromptSums) -> PromptSums:
    """What a prompt and a further pass came to: all adds up, but the last row, which is the latter's."""
    if before is None:
        return latest
    device = latest.received.device
    received = before.received if before.columns is None else before.received[..., before.columns]
    received = _widened(received.to(device), latest.received)
    received[:, LAST] = 0.0
    past = before.history
    if past is not None and latest.history is not None:
        past = _widened(past.to(device), latest.history) + latest.history
    texts = before.texts
    if texts is not None and latest.texts is not None:
        texts = torch.cat([_widened(texts.to(device), latest.received), latest.texts], dim=1)
    sums = joined_sums(before.sums, latest.sums, "last")
    return PromptSums(sums, received + latest.received, past, texts=texts)


def _widened(values: Tensor, latest: Tensor) -> Tensor:
    """A copy with as many columns as `latest`; there was nothing yet in those behind."""
    return torch.nn.functional.pad(values, (0, latest.shape[-1] - values.shape[-1])).clone()


def _measure(
    total: PromptSums, attention: PromptAttention, plan: MeasuredRows, block: Block, seen: int, groups: slice
) -> None:
    """Add one block of rows and one slice of KV groups."""
    every, size = len(attention.query), len(attention.query) // len(attention.key)
    heads = slice(groups.start * size, groups.stop * size)
    options, columns = plan.options, plan.columns
    logits = head_logits(
        attention.query[heads, block.rows - attention.before],
        attention.key[groups, :seen],
        attention.scaling,
        attention.softcap,
    )
    blind = None
    if attention.mask is not None:
        allowed = attention.mask[..., block.rows - attention.before, :]
        allowed = allowed[heads] if allowed.ndim == 3 else allowed
        logits += (~allowed).float() * UNSEEN  # several times as fast as filling by a mask
        blind = ~allowed.any(dim=-1)
    elif attention.causal:
        logits[..., block.first + 1 :] += block.later
    sinks = None if attention.sinks is None else attention.sinks[heads].view(-1, 1, 1)
    weights = softmax(logits, sinks)
    values, text = row_values(logits, weights, columns, block.bins, sinks is not None)
    if blind is not None:
        weights.masked_fill_(blind[..., None], 0.0)
        values.masked_fill_(blind[..., None], 0.0)
    total.sums.add(values, block.kinds, heads, every)
    visible = len(columns.vision) and (attention.mask is not None or seen > columns.vision.positions[0])
    if visible and len(block.covered):
        vision = columns.vision.of_first(weights[:, block.covered])
        counts = statistics.coverage(statistics.descending(vision), columns.shares)
        total.sums.add_coverage(counts, block.covered_kinds, heads, every)
    where = heads if options.per_head else slice(0, 1)
    if block.is_received:
        gained = columns.vision.of_first(_kept(block.received @ weights, options))
        total.received[where, :, : gained.shape[-1]] += gained
    if total.texts is not None and len(block.is_text):
        given = columns.vision.of_first(_kept(weights[:, block.is_text], options))
        total.texts[where, block.texts, : given.shape[-1]] += given
    if total.history is not None and options.history is not None and len(block.is_text):
        rows = block.is_text
        scores = history(text[:, rows], block.order[rows], options.history, decoding=False)
        added = _kept(scores, options)
        total.history[where, : added.shape[-1]] += added


def _kept(values: Tensor, options: RecordOptions) -> Tensor:
    """Values `[h, ...]` of some heads as they are added up: one by one, or `[1, ...]` together."""
    return values if options.per_head else values.sum(dim=0, keepdim=True)
