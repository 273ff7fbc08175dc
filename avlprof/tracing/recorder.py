"""The recorder: listens to a model's attention and measures it while the user generates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import Modality
from avlprof.attention.rows import row_weights
from avlprof.attention.session import switched
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.record import RowRecord


class Recorder:
    """Observer that fills one `RowRecord` per row of each batch that the model is run on.

    `records` holds those of all prompts so far, in order; the latest batch is being added to.
    """

    def __init__(self, layers: int, options: RecordOptions) -> None:
        self.records: list[RowRecord] = []
        self._layers, self._options = layers, options
        self._batch: list[RowRecord] = []
        self._columns: list[Tensor | slice] = []

    def begin(self, forward: Forward) -> None:
        """A forward pass starts: a prompt opens new records, a step extends the present ones."""
        real = forward.modality != Modality.PAD
        self._columns = [_all_or(row.nonzero()[:, 0], len(row)) for row in real]
        if forward.step == 0:
            self.settle()
            self._batch = [
                RowRecord(codes[columns], self._layers, self._options)
                for codes, columns in zip(forward.modality, self._columns, strict=True)
            ]
            self.records.extend(self._batch)
        else:
            for record in self._batch:
                record.steps += 1

    @torch.no_grad()
    def attended(self, forward: Forward, call: AttentionCall) -> None:
        """One layer has attended: measure the wanted rows of every row of the batch."""
        for row, (record, columns) in enumerate(zip(self._batch, self._columns, strict=True)):
            if forward.step == 0:
                _prefill(record, call, row, columns)
            elif forward.new == 1:
                weights = _step_weights(call, row, forward.modality.shape[1])[..., columns]
                record.add_step(call.layer, weights, forward.modality[row, columns])

    @torch.no_grad()
    def settle(self) -> None:
        """Measure what is held back of the latest batch, which frees its weights."""
        for record in self._batch:
            record.settle()


def _all_or(columns: Tensor, length: int) -> Tensor | slice:
    """A row's columns without padding; a slice, which copies nothing, when there is none."""
    return slice(0, length) if len(columns) == length else columns


def _prefill(record: RowRecord, call: AttentionCall, row: int, columns: Tensor | slice) -> None:
    """Record the wanted rows of a prompt, `options.block` of them at a time."""
    length = len(record.modality)
    query, key = call.query[row : row + 1], call.key[row : row + 1, :, columns].float()
    places = torch.arange(length, device=key.device)
    for kind, rows, covered in record.query_blocks:
        at = rows if isinstance(columns, slice) else columns[rows]
        if call.mask is not None:
            seen = call.mask[row, 0][at][:, columns]
        elif getattr(call.module, "is_causal", True):
            seen = places <= rows[:, None]
        else:
            seen = None
        weights = row_weights(query[:, :, at], key, call.scaling, seen, call.softcap)[0]
        record.add_prefill(call.layer, kind, rows, covered, weights)


def _step_weights(call: AttentionCall, row: int, length: int) -> Tensor:
    """Weights `[H, 1, length]` of a decoding step, zero on what was not attended to."""
    query, key = call.query[row : row + 1], call.key[row : row + 1]
    mask = call.mask[row : row + 1] if call.mask is not None else None
    if call.valid is not None:
        mask = call.valid[row : row + 1]
    weights = row_weights(query, key, call.scaling, mask, call.softcap)[0]
    if call.positions is None:
        # a sliding window's cache hands over the newest keys alone
        missing = length - weights.shape[-1]
        return torch.nn.functional.pad(weights, (missing, 0)) if missing > 0 else weights
    positions = call.positions[row]
    heads = weights.shape[0] // positions.shape[0]
    index = positions.repeat_interleave(heads, dim=0)[:, None].clamp(min=0)
    return weights.new_zeros((weights.shape[0], 1, length)).scatter_add(2, index, weights)


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
