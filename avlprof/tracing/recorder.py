"""The recorder: an observer that measures every row of a batch, each as if it ran alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.gate import unwrapped
from avlprof.attention.modality import Modality
from avlprof.attention.session import switched
from avlprof.attention.weights import row_logits
from avlprof.tracing.batch import BatchRows
from avlprof.tracing.columns import UNSEEN, TokenColumns
from avlprof.tracing.fused import measure_batch, serves
from avlprof.tracing.held import HeldSteps
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.prompt import PromptAttention
from avlprof.tracing.record import RowRecord


@dataclass
class _Batch:
    """The rows of one prompt; `open` are those that are still recorded, `real [B, N]` marks tokens."""

    rows: list[tuple[RowRecord, TokenColumns]]
    open: list[int]
    real: Tensor
    plans: dict[torch.device, BatchRows] = field(default_factory=dict)
    held: dict[int, HeldSteps] = field(default_factory=dict)

    def plan(self, device: torch.device) -> BatchRows:
        """What kernels measure of the prompt, made once for a device."""
        if device not in self.plans:
            rows = [record.plan(device) for record, _ in self.rows]
            self.plans[device] = BatchRows.of(rows, self.real, device)
        return self.plans[device]

    @torch.no_grad()
    def measure_held(self) -> None:
        """Hand the steps that are held back as queries to their records."""
        for held in self.held.values():
            held.measure(self.rows)

    def settle(self) -> None:
        """Measure what is held back, which frees it."""
        for record, _ in self.rows:
            record.settle()


class Recorder:
    """Observer that fills one `RowRecord` per row of each batch that the model is run on.

    `records` holds those of all prompts so far, in order; further passes over a cache add to the
    records of its prompt. `generate` goes on feeding a row that has answered until the whole batch
    has; `stop` closes its record. Threads may run the model at once.
    """

    def __init__(self, layers: int, options: RecordOptions) -> None:
        self.records: list[RowRecord] = []
        self._layers, self._options = layers, options
        self._batches: WeakKeyDictionary[Any, _Batch] = WeakKeyDictionary()
        self._latest = _Latest()
        self._unsettled: list[_Batch] = []

    def stop(self, rows: Iterable[int]) -> None:
        """Record nothing more of these rows of this thread's latest batch."""
        closed, batch = set(rows), self._latest.batch
        if batch is not None:
            batch.open = [row for row in batch.open if row not in closed]

    def begin(self, forward: Forward) -> None:
        """A forward pass starts: a prompt opens new records, a step extends those that are open."""
        total = forward.modality.shape[1]
        if forward.step and forward.new == 1:
            fresh = torch.full((len(forward.modality), 1), int(Modality.GENERATED), dtype=torch.int8)
        else:  # the one wait for a device in a pass; positions and counts are worked out on the host
            fresh = forward.modality[:, total - forward.new :].cpu()
        real = fresh != Modality.PAD
        if forward.step == 0:
            self._open(forward, fresh, real)
            return
        batch = self._batches[forward.conversation]
        if forward.new > 1 or forward.moved:
            batch.measure_held()
        for row in batch.open:
            record, columns = batch.rows[row]
            own = fresh[row][real[row]]
            if forward.new > 1:
                record.extend(own)
            else:
                record.grow(own)
            columns.grow(real[row])

    def _open(self, forward: Forward, fresh: Tensor, real: Tensor) -> None:
        """New records for the rows of a prompt; this thread's latest ones are measured."""
        before = self._latest.batch
        if before is not None:
            before.settle()
            self._unsettled.remove(before)
        rows = [
            (RowRecord(codes[own], self._layers, self._options), TokenColumns(own))
            for codes, own in zip(fresh, real, strict=True)
        ]
        batch = _Batch(rows, list(range(len(rows))), real)
        for record, _ in rows:
            record.before_settling = batch.measure_held
        self._latest.batch = self._batches[forward.conversation] = batch
        self._unsettled.append(batch)
        self.records.extend(record for record, _ in rows)

    @torch.no_grad()
    def attended(self, forward: Forward, call: AttentionCall) -> None:
        """One layer has attended: measure the chosen rows of every open row of the batch."""
        batch = self._batches[forward.conversation]
        if not batch.open:
            return
        if forward.step == 0 or forward.new > 1:
            self._measure(batch, forward, call)
        elif call.appended and call.key.shape[2] == forward.modality.shape[1]:
            held = batch.held.setdefault(call.layer, HeldSteps(self._options.step_logits))
            if held.hold(call, batch.open):
                held.measure(batch.rows)
        else:
            # a slice, which copies no keys: closed rows in between are measured in vain
            rows = slice(batch.open[0], batch.open[-1] + 1)
            logits = _step_logits(_rows(call, rows), forward.modality.shape[1])
            for row in batch.open:
                record, columns = batch.rows[row]
                own = logits[row - rows.start][:, columns.columns(logits.device)]
                record.add_step(call.layer, own, call.sinks)

    def _measure(self, batch: _Batch, forward: Forward, call: AttentionCall) -> None:
        """Measure the rows of a prompt, or of a further pass of several tokens."""
        begun = all(record.new for record, _ in batch.rows)  # else a part of a prompt is padding in some row
        served = forward.step == 0 and begun and serves(call, self._options)
        plan = batch.plan(call.key.device) if served else None
        if plan is not None and plan.fits:
            for (record, _), sums in zip(batch.rows, measure_batch(call, plan), strict=True):
                record.take_prompt(call.layer, sums)
            return
        for row in batch.open:
            record, columns = batch.rows[row]
            if record.new and forward.step == 0:
                record.add_prompt(call.layer, _prompt(call, row, columns))
            elif record.new:
                total = forward.modality.shape[1]
                record.add_turn(call.layer, _turn(call, row, columns, record.new, total))

    @torch.no_grad()
    def settle(self) -> None:
        """Measure what is held back of every batch, which frees it."""
        for batch in self._unsettled:
            batch.settle()


class _Latest(threading.local):
    """The batch that a thread opened last."""

    batch: _Batch | None = None


def _rows(call: AttentionCall, rows: slice) -> AttentionCall:
    """Some rows of a batch, as views; what is one for all rows stays so."""

    def part(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]

    return call._replace(
        query=call.query[rows],
        key=call.key[rows],
        value=call.value[rows],
        mask=part(call.mask),
        positions=part(call.positions),
        valid=part(call.valid),
    )


def _prompt(call: AttentionCall, row: int, own: TokenColumns) -> PromptAttention:
    """What one row of the batch attended with, its padding left out."""
    columns = own.columns(call.key.device)
    mask = None
    if call.mask is not None:
        mask = call.mask[row if len(call.mask) > 1 else 0][:, columns][:, :, columns]
        mask = mask[0] if len(mask) == 1 else mask
    return PromptAttention(
        query=call.query[row][:, columns],
        key=call.key[row][:, columns],
        scaling=call.scaling,
        softcap=call.softcap,
        mask=mask,
        causal=bool(getattr(call.module, "is_causal", True)),
        sinks=call.sinks,
    )


def _turn(call: AttentionCall, row: int, own: TokenColumns, new: int, total: int) -> PromptAttention:
    """What the `new` tokens of one row of the batch attended with, in a pass behind others.

    Keys come in the order of their positions among `total`: a sliding window hands over the newest
    alone, a policy's buffers what they hold in an order of their own.
    """
    device, key = call.key.device, call.key[row]
    columns = own.columns(device)
    columns = (
        torch.arange(columns.start, columns.stop, device=device) if isinstance(columns, slice) else columns
    )
    rows, first = columns[-new:], total - call.query.shape[2]
    if call.positions is None:
        at = torch.arange(total - key.shape[1], total, device=device)[None]
    else:
        at = call.positions[row if len(call.positions) > 1 else 0]
    if call.mask is None:
        seen = (at[:, None] <= rows[:, None]) & (at[:, None] >= 0)
    else:
        seen = call.mask[row if len(call.mask) > 1 else 0][:, rows - first]
    by_head = max(len(seen), 1 if len(at) == 1 else call.query.shape[1])
    seen = seen.repeat_interleave(by_head // len(seen), dim=0)
    used = seen.any(dim=1)
    # a slot that no row sees goes to a column of its own, which is none of a token
    places = at.repeat_interleave(by_head // len(at), dim=0).masked_fill(~used, total)
    allowed = seen.new_zeros(by_head, new, total + 1).scatter_(2, places[:, None].expand_as(seen), seen)
    groups = min(by_head, len(key))
    held = used.view(groups, -1, used.shape[-1]).any(dim=1)
    slots = at.expand(groups, -1).masked_fill(~held, total).expand(len(key), -1)
    whole = key.new_zeros(len(key), total + 1, key.shape[2])
    whole.scatter_(1, slots[..., None].expand_as(key), key)
    mask = allowed[:, :, columns]
    return PromptAttention(
        query=call.query[row][:, rows - first],
        key=whole[:, columns],
        scaling=call.scaling,
        softcap=call.softcap,
        mask=mask[0] if by_head == 1 else mask,
        causal=True,
        sinks=call.sinks,
    )


def _step_logits(call: AttentionCall, length: int) -> Tensor:
    """Logits `[B, H, length]` of a decoding step, `UNSEEN` on what was not attended to."""
    logits = row_logits(call.query, call.key, call.scaling, call.softcap)[:, :, 0]
    seen = call.valid if call.valid is not None else call.mask
    if seen is not None:
        seen = seen[:, :, 0].repeat_interleave(logits.shape[1] // seen.shape[1], dim=1)
        logits = logits.masked_fill_(~seen, UNSEEN)
    if call.positions is None:
        # a sliding window's cache hands over the newest keys alone
        missing = length - logits.shape[-1]
        return torch.nn.functional.pad(logits, (missing, 0), value=UNSEEN) if missing > 0 else logits
    heads = logits.shape[1] // call.positions.shape[1]
    columns = call.positions.repeat_interleave(heads, dim=1).expand_as(logits)
    # slots without a token go to a column of their own
    empty = columns < 0 if seen is None else ~seen
    whole = logits.new_full((*logits.shape[:2], length + 1), UNSEEN)
    return whole.scatter_(2, columns.masked_fill(empty, length), logits)[..., :length]


@contextlib.contextmanager
def record(model: PreTrainedModel, options: RecordOptions | None = None) -> Iterator[Recorder]:
    """Measure the attention of everything the model does inside the context.

    The model's own attention implementation computes the output; the recorder only looks on.
    Inside `avlprof.apply` it records what the policy attends to.

    Example:
        with avlprof.record(model) as recorder:
            model.generate(**inputs)
        recorder.records[0].frame()
    """
    model = unwrapped(model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    recorder = Recorder(layers, options or RecordOptions())
    with switched(model, observers=(recorder,)):
        yield recorder
    recorder.settle()
