"""The rows of a batch, recorded apart: each as if it ran alone, and only as long as it answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from avlprof.attention.call import AttentionCall, Forward
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.record import RowRecord
from avlprof.tracing.recorder import Recorder


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
