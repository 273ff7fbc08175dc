"""The rows of a batch, recorded apart: each as if it ran alone, and only as long as it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import Modality
from avlprof.attention.session import switched
from avlprof.attention.weights import row_logits
from avlprof.tracing.columns import UNSEEN, Places
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.prompt import PromptAttention
from avlprof.tracing.record import RowRecord


class BatchRecorder:
    """Observer that hands each row of one batch to a recorder of its own.

    `generate` goes on feeding a row that has answered until the whole batch has; `stop` closes
    its record. Use it for one prompt, with `avlprof.attention.session.switched`.
    """

    def __init__(self, rows: int, layers: int, options: RecordOptions) -> None:
        self._recorders = [Recorder(layers, options) for _ in range(rows)]
        self._live = [True] * rows

    def stop(self, rows: Iterable[int]) -> None:
        """Record nothing more of these rows."""
        for row in rows:
            self._live[row] = False

    def records(self) -> list[RowRecord]:
        """What was recorded of each row."""
        for recorder in self._recorders:
            recorder.settle()
        return [recorder.records[0] for recorder in self._recorders]

    def begin(self, forward: Forward) -> None:
        """A forward pass starts."""
        here = replace(forward, modality=forward.modality.cpu())  # one wait for a device, not one a row
        for row in self._open():
            self._recorders[row].begin(self._forward(here, row))

    def attended(self, forward: Forward, call: AttentionCall) -> None:
        """One layer has attended."""
        for row in self._open():
            self._recorders[row].attended(self._forward(forward, row), self._call(call, row))

    def _open(self) -> list[int]:
        return [row for row, live in enumerate(self._live) if live]

    def _forward(self, forward: Forward, row: int) -> Forward:
        if len(self._recorders) == 1:
            return forward
        return replace(forward, modality=forward.modality[row : row + 1])

    def _call(self, call: AttentionCall, row: int) -> AttentionCall:
        if len(self._recorders) == 1:
            return call
        return call._replace(
            query=call.query[row : row + 1],
            key=call.key[row : row + 1],
            value=call.value[row : row + 1],
            mask=_part(call.mask, row),
            positions=_part(call.positions, row),
            valid=_part(call.valid, row),
        )


def _part(tensor: Tensor | None, row: int) -> Tensor | None:
    """A row of what may be given once for all rows, or not at all."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[row : row + 1]


class Recorder:
    """Observer that fills one `RowRecord` per row of each batch that the model is run on.

    `records` holds those of all prompts so far, in order; the latest batch is being added to.
    """

    def __init__(self, layers: int, options: RecordOptions) -> None:
        self.records: list[RowRecord] = []
        self._layers, self._options = layers, options
        self._batch: list[tuple[RowRecord, Places]] = []

    def begin(self, forward: Forward) -> None:
        """A forward pass starts: a prompt opens new records, a step extends the present ones."""
        total = forward.modality.shape[1]
        # the one wait for a device in a pass; places and counts are worked out on the host
        fresh = forward.modality[:, total - forward.new :].cpu()
        real = fresh != Modality.PAD
        if forward.step == 0:
            self.settle()
            self._batch = [
                (RowRecord(codes[seen], self._layers, self._options), Places(seen))
                for codes, seen in zip(fresh, real, strict=True)
            ]
            self.records.extend(record for record, _ in self._batch)
            return
        for (record, places), codes, seen in zip(self._batch, fresh, real, strict=True):
            record.grow(codes[seen])
            places.grow(seen)

    @torch.no_grad()
    def attended(self, forward: Forward, call: AttentionCall) -> None:
        """One layer has attended: measure the wanted rows of every row of the batch."""
        if forward.step == 0:
            for row, (record, places) in enumerate(self._batch):
                record.add_prompt(call.layer, _prompt(call, row, places))
        elif forward.new == 1:
            logits = _step_logits(call, forward.modality.shape[1])
            for row, (record, places) in enumerate(self._batch):
                record.add_step(call.layer, logits[row][:, places.columns(logits.device)])

    @torch.no_grad()
    def settle(self) -> None:
        """Measure what is held back of the latest batch, which frees it."""
        for record, _ in self._batch:
            record.settle()


def _prompt(call: AttentionCall, row: int, places: Places) -> PromptAttention:
    """What one row of the batch attended with, its padding left out."""
    columns = places.columns(call.key.device)
    mask = None
    if call.mask is not None:
        mask = call.mask[row if len(call.mask) > 1 else 0, 0][columns][:, columns]
    return PromptAttention(
        query=call.query[row][:, columns],
        key=call.key[row][:, columns],
        scaling=call.scaling,
        softcap=call.softcap,
        mask=mask,
        causal=bool(getattr(call.module, "is_causal", True)),
    )


def _step_logits(call: AttentionCall, length: int) -> Tensor:
    """Logits `[B, H, length]` of a decoding step, `UNSEEN` on what was not attended to."""
    logits = row_logits(call.query, call.key, call.scaling, call.softcap)[:, :, 0]
    seen = call.valid if call.valid is not None else call.mask
    if seen is not None:
        logits = logits.masked_fill_(~seen[:, :, 0], UNSEEN)
    if call.positions is None:
        # a sliding window's cache hands over the newest keys alone
        missing = length - logits.shape[-1]
        return torch.nn.functional.pad(logits, (missing, 0), value=UNSEEN) if missing > 0 else logits
    heads = logits.shape[1] // call.positions.shape[1]
    places = call.positions.repeat_interleave(heads, dim=1).expand_as(logits)
    # slots without a token go to a column of their own
    places = (
        torch.where(places < 0, length, places)
        if seen is None
        else places.masked_fill(~seen[:, :, 0], length)
    )
    whole = logits.new_full((*logits.shape[:2], length + 1), UNSEEN)
    return whole.scatter_(2, places, logits)[..., :length]


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
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    recorder = Recorder(layers, options or RecordOptions())
    with switched(model, observers=(recorder,)):
        yield recorder
    recorder.settle()
