"""The recorder: listens to a model's attention and measures it while the user generates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.modality import Modality
from avlprof.attention.rows import row_weights
from avlprof.attention.session import AttentionCall, Forward, switched
from avlprof.tracing.record import RecordOptions, RowRecord


class Recorder:
    """Observer that fills one `RowRecord` per row of each batch that the model is run on.

    `records` holds those of all prompts so far, in order; the latest batch is being added to.
    """

    def __init__(self, layers: int, options: RecordOptions) -> None:
        self.records: list[RowRecord] = []
        self._layers, self._options = layers, options
        self._batch: list[RowRecord] = []
        self._columns: list[Tensor] = []

    def begin(self, forward: Forward) -> None:
        """A forward pass starts: a prompt opens new records, a step extends the present ones."""
        real = forward.modality != Modality.PAD
        self._columns = [row.nonzero()[:, 0] for row in real]
        if forward.step == 0:
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
                self._prefill(record, call, row, columns)
            elif forward.new == 1:
                weights = _step_weights(call, row, forward.modality.shape[1])[..., columns]
                record.add_step(call.layer, weights, forward.modality[row, columns])

    def _prefill(self, record: RowRecord, call: AttentionCall, row: int, columns: Tensor) -> None:
        query, key = call.query[row : row + 1], call.key[row : row + 1, :, columns]
        places = torch.arange(len(columns), device=key.device)
        for kind, rows in record.query_rows():
            for block in rows.split(self._options.block):
                if call.mask is not None:
                    mask = call.mask[row, 0][columns[block]][:, columns]
                elif getattr(call.module, "is_causal", True):
                    mask = places <= block[:, None]
                else:
                    mask = places >= 0
                weights = row_weights(query[:, :, columns[block]], key, call.scaling, mask, call.softcap)
                record.add_prefill(call.layer, kind, block, weights[0])


def _step_weights(call: AttentionCall, row: int, length: int) -> Tensor:
    """Weights `[H, 1, length]` of a decoding step, zero on what was not attended to."""
    query, key = call.query[row : row + 1], call.key[row : row + 1]
    mask = call.mask[row : row + 1] if call.mask is not None else None
    if call.valid is not None:
        mask = call.valid[row : row + 1]
    weights = row_weights(query, key, call.scaling, mask, call.softcap)[0]
    if call.positions is None:
        return weights
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
