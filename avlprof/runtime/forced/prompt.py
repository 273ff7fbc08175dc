"""A cache that holds nothing and pretends to hold a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.codec import degraded
from avlprof.attention.modality import Modality
from avlprof.attention.ranking import ranks
from avlprof.attention.weights import group_mean
from avlprof.policy import FULL, ScorerSpec
from avlprof.runtime.buffers import BufferedLayer
from avlprof.runtime.forced.score import Head
from avlprof.scorers import Prefill, make_scorer


class PassThrough(BufferedLayer):
    """A layer that stores nothing: it reports a prompt of `seen` tokens and hands through."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The pass's own keys and values, unchanged."""
        return key_states, value_states


class ForcedCache(Cache):
    """A cache that pretends to hold a prompt of `length` tokens in each of `layers` layers."""

    def __init__(self, layers: int, length: int) -> None:
        super().__init__(layers=[PassThrough(length) for _ in range(layers)])


COPIES = 1 << 26
"""Most bytes of copies in few bits that prompts which run together keep."""

_TEXT_ROWS = 64  # text rows whose weights exist at a time


@dataclass(frozen=True)
class PromptLayer:
    """One layer's KV of a batch of prompts.

    `key` and `value` are `[B, Hkv, N, D]`, `modality [B, N]` holds `Modality` codes and `columns
    [B, N]` the columns of the padded prompt: behind a prefill filter a layer has fewer of them.
    """

    key: Tensor
    value: Tensor
    modality: Tensor
    columns: Tensor

    def by_column(self, rows: Tensor) -> Tensor:
        """Values `[B, ..., N]` of the layer's tokens by column of the padded prompt; elsewhere -1."""
        index = self.columns[:, *(None,) * (rows.ndim - 2)].expand_as(rows)
        length = int(self.columns.max()) + 1
        return rows.new_full((*rows.shape[:-1], length), -1.0).scatter(-1, index, rows)

    def at_columns(self, values: Tensor) -> Tensor:
        """The values `[B, ..., N]` of the layer's tokens, of values by column; -1 where there are none."""
        index = self.columns[:, *(None,) * (values.ndim - 2)]
        index = index.expand(*values.shape[:-1], -1)
        known = values.gather(-1, index.clamp(max=values.shape[-1] - 1))
        return known.masked_fill(index >= values.shape[-1], -1.0)

    def degraded(self, bits: int, text: bool = False) -> PromptLayer:
        """The layer with vision, or system and `text`, as it is after few bits; a copy, while it is used."""
        if bits == FULL:
            return self
        vision, real = self.modality == Modality.VISION, self.modality != Modality.PAD
        marked = real & ~vision if text else vision
        columns = marked.any(dim=0).nonzero()[:, 0]
        marked, parts = marked[:, None, columns, None], (self.key, self.value)
        own = [part.index_select(2, columns) for part in parts]
        few = [torch.where(marked, degraded(part, bits), part) for part in own]
        key, value = (part.index_copy(2, columns, new) for part, new in zip(parts, few, strict=True))
        return replace(self, key=key, value=value)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.key.numel() * self.key.element_size() + self.value.numel() * self.value.element_size()


@dataclass(frozen=True)
class Prompts:
    """Prefilled prompts: KV of every layer, scores by scorer, and what the last row said.

    `scores[name]` has `[B, H, N]` a layer for the scorer whose JSON is `name`; `text` has `[B, Hkv,
    C, C]` a layer: attention of text rows to text columns, mean over the query heads of a group,
    each prompt's C text tokens left-aligned and zeros behind; empty until a policy asks for it.
    `last [B, D]` is what the head turns into the logits of the first answer token.
    """

    layers: list[PromptLayer]
    last: Tensor
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    text: list[Tensor] = field(default_factory=list)
    _ranks: dict[tuple[str, int, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _stored: dict[tuple[int, int, int], PromptLayer] = field(default_factory=dict, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scores."""
        kept = [*self.text, *(s for layers in self.scores.values() for s in layers)]
        return sum(layer.nbytes for layer in self.layers) + sum(t.numel() * t.element_size() for t in kept)

    @property
    def copies(self) -> int:
        """Bytes of keys and values as few bits left them that are kept for the next policy."""
        return sum(layer.nbytes for layer in self._stored.values())

    def forget(self) -> None:
        """Let go of what few bits left."""
        self._stored.clear()

    @property
    def parts(self) -> tuple[frozenset[str], bool]:
        """Which scores there are, and whether text weights are."""
        return frozenset(self.scores), bool(self.text)

    def rows(self, rows: slice) -> Prompts:
        """Some of the prompts, as views, without the columns that are padding in all of them."""
        return self._mapped(lambda t: t[rows], trim=True)

    def reordered(self, order: Tensor) -> Prompts:
        """The prompts in another order; a copy."""
        return self._mapped(lambda t: _ordered(t, order), trim=False)

    def moved(self, device: torch.device | str = "cpu") -> Prompts:
        """The prompts on another device, by default the host."""
        return self._mapped(lambda t: t.to(device), trim=False)

    def with_scores(self, scores: dict[str, list[Tensor]], text: list[Tensor], order: Tensor) -> Prompts:
        """The same prompts with more scores and, if there are any, text weights, given in another order."""
        more = {name: [_ordered(s, order) for s in layers] for name, layers in scores.items()}
        return replace(self, scores=self.scores | more, text=[_ordered(t, order) for t in text] or self.text)

    def group_scores(self, spec: ScorerSpec, groups: int, layer: int) -> Tensor:
        """Scores `[B, G, N]` of a layer's tokens: means over the query heads of `groups` groups."""
        return group_mean(self.scores[spec.key][layer], groups)

    def vision_ranks(self, spec: ScorerSpec, groups: int, layer: int) -> Tensor:
        """Rank `[B, G, N]` of every vision token by a scorer, best 0; other tokens come behind.

        Ties go to the lower position.
        """
        key = (spec.key, groups, layer)
        if key not in self._ranks:
            scores = self.group_scores(spec, groups, layer)
            vision = (self.layers[layer].modality == Modality.VISION)[:, None]
            self._ranks[key] = ranks(scores.masked_fill(~vision, float("-inf")))
        return self._ranks[key]

    def stored(self, layer: int, text_bits: int, bits: int) -> PromptLayer:
        """A layer with system and text, and vision, as they are after few bits.

        The latest are kept, up to three times what the prompts take or `COPIES` bytes, since a search stores
        the same prompts in the same few bits time and again.
        """
        if text_bits == bits == FULL:
            return self.layers[layer]
        key = (layer, text_bits, bits)
        found = self._stored.pop(key, None)
        if found is None:
            found = self.layers[layer].degraded(text_bits, text=True).degraded(bits)
        self._stored[key] = found
        most = min(COPIES, 3 * sum(own.nbytes for own in self.layers))
        while self.copies > most:
            del self._stored[next(iter(self._stored))]
        return found

    def _mapped(self, pick: Callable[[Tensor], Tensor], trim: bool) -> Prompts:
        picked: dict[int, tuple[Tensor, int]] = {}  # layers share their maps; one object each stays one
        for layer in self.layers:
            if id(layer.modality) not in picked:
                modality = pick(layer.modality)
                first = int((modality != Modality.PAD).any(dim=0).int().argmax()) if trim else 0
                picked[id(layer.modality)] = (modality[:, first:], first)
        layers = []
        for layer in self.layers:
            modality, first = picked[id(layer.modality)]
            key, value = pick(layer.key)[:, :, first:], pick(layer.value)[:, :, first:]
            layers.append(PromptLayer(key, value, modality, pick(layer.columns)[:, first:]))
        starts = [picked[id(layer.modality)][1] for layer in self.layers]
        picked_scores = {
            name: [pick(s)[..., start:] for s, start in zip(scores, starts, strict=True)]
            for name, scores in self.scores.items()
        }
        return Prompts(layers, pick(self.last), picked_scores, [pick(t) for t in self.text])


def _ordered(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.index_select(0, order.to(tensor.device))


class Capture:
    """Observer of a model's prefill: keeps what `Prompts` holds, and ignores decoding steps.

    `text` asks for the text weights. Valid when one prompt has run inside `running`.
    """

    def __init__(self, scorers: list[ScorerSpec], text: bool = False, keep_kv: bool = True) -> None:
        self.scorers = {spec.key: make_scorer(spec) for spec in scorers}
        self.scores: dict[str, list[Tensor]] = {name: [] for name in self.scorers}
        self.with_text, self.keep_kv = text, keep_kv
        self.layers: list[PromptLayer] = []
        self.text: list[Tensor] = []
        self.last: Tensor | None = None
        self.causal_from: Tensor | None = None
        self._masks: set[int] = set()

    def begin(self, forward: Forward) -> None:
        """Nothing to prepare."""

    def attended(self, forward: Forward, call: AttentionCall) -> None:
        """Keep one layer of the prompt."""
        if forward.step == 0:
            modality = forward.modality
            columns = torch.arange(modality.shape[1], device=modality.device).expand(modality.shape)
            self.keep(call, prefill := Prefill.of(call, modality), columns)
            self._look_ahead(prefill)

    def keep(self, call: AttentionCall, prefill: Prefill, columns: Tensor) -> None:
        """Keep one layer; layers come in order. `columns [B, N]` are those of the padded prompt."""
        if self.keep_kv:
            before = self.layers[-1] if self.layers else None
            same = before is not None and torch.equal(before.columns, columns)
            modality = before.modality if before is not None and same else prefill.modality
            self.layers.append(PromptLayer(call.key, call.value, modality, columns))
        for name, scorer in self.scorers.items():
            self.scores[name].append(scorer.score(prefill))
        if self.with_text:
            self.text.append(text_weights(prefill))

    def _look_ahead(self, prefill: Prefill) -> None:
        """Note how far rows see what comes behind them, once for each mask that layers share."""
        which = 0 if prefill.mask is None else prefill.mask.data_ptr()
        if which in self._masks:
            return
        self._masks.add(which)
        found = causal_from(prefill)
        self.causal_from = found if self.causal_from is None else torch.maximum(found, self.causal_from)

    @contextmanager
    def reading_last(self, head: Head, short: bool = False) -> Iterator[None]:
        """Note the prompt's last row on its way into the head; `short` spares the other rows' logits."""
        with head.watched(short) as seen:
            yield
        self.last = seen.first

    def prompts(self) -> Prompts:
        """What was kept."""
        assert self.last is not None
        return Prompts(self.layers, self.last, dict(self.scores), self.text)


def causal_from(prefill: Prefill) -> Tensor:
    """Column `[B]` from which on no token is seen by an earlier one: 0 where attention is causal."""
    batch, length = prefill.modality.shape
    if prefill.mask is None:
        return prefill.modality.new_full((batch,), 0 if prefill.causal else length, dtype=torch.long)
    later = prefill.mask[:, 0].triu(1) & prefill.valid[:, :, None] & prefill.valid[:, None]
    columns = torch.arange(1, length + 1, device=later.device)
    return (later.any(dim=1) * columns).amax(dim=1)


def text_weights(prefill: Prefill) -> Tensor:
    """Weights `[B, Hkv, C, C]` of text rows on text columns, as `Prompts.text` holds them."""
    text = prefill.modality == Modality.TEXT
    order, real = left_aligned(text)
    groups = prefill.key.shape[1]
    blocks = []
    for start in range(0, order.shape[1], _TEXT_ROWS):
        rows = order[:, start : start + _TEXT_ROWS]
        weights = group_mean(prefill.weights(rows), groups)
        index = order[:, None, None].expand(-1, groups, rows.shape[1], -1)
        blocks.append(weights.gather(-1, index) * real[:, None, start : start + _TEXT_ROWS, None])
    if not blocks:
        return prefill.key.new_zeros((order.shape[0], groups, 0, 0), dtype=torch.float32)
    return torch.cat(blocks, dim=2) * real[:, None, None]


def left_aligned(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Columns `[B, C]` of the marked tokens of `marked [B, N]` in order, and which of them are real."""
    counts = marked.sum(dim=1, keepdim=True)
    most = int(counts.max())
    order = (~marked).long().argsort(dim=1, stable=True)[:, :most]
    return order, torch.arange(most, device=marked.device) < counts
