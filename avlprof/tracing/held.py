"""Decoding steps whose keys a cache only appends to: held back as queries, and measured together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.attention.weights import head_logits
from avlprof.tracing.columns import UNSEEN, TokenColumns
from avlprof.tracing.record import RowRecord
from avlprof.tracing.steps import STEPS_AT_ONCE

CPU_LOGITS, DEVICE_LOGITS = 1 << 18, 1 << 23  # of the steps of one row that are measured together


class HeldSteps:
    """Steps of one layer of a batch, oldest first; the newest step's keys hold those of all.

    A step costs nothing but a reference to its query until they are measured, and then one product
    serves all of them. Nothing waits for a device.
    """

    def __init__(self, most: int | None) -> None:
        """`most` logits of a row exist at a time; None: what suits the device."""
        self._most = most
        self._calls: list[AttentionCall] = []
        self._open: list[tuple[int, ...]] = []

    def hold(self, call: AttentionCall, rows: Sequence[int]) -> bool:
        """Take a step that is recorded for some rows of the batch; whether it is time to measure."""
        if self._calls:  # all but the newest are their queries and masks
            none = self._calls[-1].key[:0]
            self._calls[-1] = self._calls[-1]._replace(key=none, value=none)
        self._calls.append(
            call._replace(query=call.query.detach(), key=call.key.detach(), value=call.key[:0])
        )
        self._open.append(tuple(rows))
        count, logits = len(self._calls), call.query.shape[1] * call.key.shape[2]
        most = self._most or (CPU_LOGITS if call.key.device.type == "cpu" else DEVICE_LOGITS)
        return count >= STEPS_AT_ONCE or count * logits > most

    def measure(self, rows: Sequence[tuple[RowRecord, TokenColumns]]) -> None:
        """Hand the logits of the held steps to the rows' records, and let go of them."""
        calls, opened = self._calls, self._open
        self._calls, self._open = [], []
        if not calls:
            return
        newest = calls[-1]
        queries = torch.cat([call.query for call in calls], dim=2)
        length = newest.key.shape[2]
        ends = torch.arange(length - len(calls), length)
        later = torch.arange(length) > ends[:, None]
        hidden = (later * UNSEEN).to(queries.device, non_blocking=True)
        for row in opened[0]:  # rows only close
            record, columns = rows[row]
            steps = sum(row in own for own in opened)
            own = columns.columns(queries.device)
            logits = (
                head_logits(queries[row, :, :steps], newest.key[row], newest.scaling, newest.softcap)
                + hidden[:steps]
            )
            masks = [call.mask for call in calls[:steps]]
            if any(mask is not None for mask in masks):
                logits = logits.masked_fill(~_seen(masks, row, length), UNSEEN)
            record.add_steps(newest.layer, logits[..., own], newest.sinks)


def _seen(masks: Sequence[Tensor | None], row: int, length: int) -> Tensor:
    """bool `[1 or H, S, length]`: what the masks of some steps let a row of the batch see."""
    own = []
    for mask in masks:
        seen = torch.ones(1, 1, 0, dtype=torch.bool) if mask is None else mask[row if len(mask) > 1 else 0]
        own.append(seen)
    widest = max((seen for seen in own), key=lambda seen: seen.shape[-1])
    padded = [
        torch.nn.functional.pad(seen.to(widest.device), (0, length - seen.shape[-1]), value=True)
        for seen in own
    ]
    return torch.cat([seen.expand(widest.shape[0], -1, -1) for seen in padded], dim=1)
