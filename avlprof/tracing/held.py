"""Decoding steps whose keys a cache only appends to: held back as queries, and measured together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.attention.weights import head_logits
from avlprof.tracing.columns import UNSEEN, TokenColumns
from avlprof.tracing.record import RowRecord
from avlprof.tracing.steps import MOST_LOGITS, STEPS_AT_ONCE

DEVICE_LOGITS = 1 << 23  # of the steps of one row that are measured together; on a CPU `MOST_LOGITS`


class HeldSteps:
    """Steps of one layer of a batch, oldest first; the newest step's keys hold those of all.

    A step costs nothing but a reference to its query (and its mask) until they are measured, and then
    one product serves all of them. Of keys only the newest are referred to. Nothing waits for a device.
    """

    def __init__(self, most: int | None) -> None:
        """`most` logits of a row exist at a time; None: what suits the device."""
        self._most = most
        self._let_go()

    def _let_go(self) -> None:
        self._newest: AttentionCall | None = None
        self._queries: list[Tensor] = []
        self._masks: list[Tensor | None] = []
        self._open: list[tuple[int, ...]] = []

    def hold(self, call: AttentionCall, rows: Sequence[int]) -> bool:
        """Take a step that is recorded for some rows of the batch; whether it is time to measure."""
        self._newest = call._replace(value=call.key)  # values are not read here, and need not stay
        self._queries.append(call.query.detach())
        self._masks.append(call.mask)
        self._open.append(tuple(rows))
        count, logits = len(self._queries), call.query.shape[1] * call.key.shape[2]
        most = self._most or (MOST_LOGITS if call.key.device.type == "cpu" else DEVICE_LOGITS)
        return count >= STEPS_AT_ONCE or count * logits > most

    def measure(self, rows: Sequence[tuple[RowRecord, TokenColumns]]) -> None:
        """Hand the logits of the held steps to the rows' records, and let go of them."""
        newest, held, masks, opened = self._newest, self._queries, self._masks, self._open
        self._let_go()
        if newest is None:
            return
        queries, length = torch.cat(held, dim=2), newest.key.shape[2]
        ends = torch.arange(length - len(held), length)
        later = torch.arange(length) > ends[:, None]
        hidden = (later * UNSEEN).to(queries.device, non_blocking=True)
        for row in opened[0]:  # rows only close
            record, columns = rows[row]
            steps = sum(row in own for own in opened)
            query, key = queries[row, :, :steps], newest.key[row]
            logits = head_logits(query, key, newest.scaling, newest.softcap) + hidden[:steps]
            if any(mask is not None for mask in masks[:steps]):
                logits = logits.masked_fill(~_seen(masks[:steps], row, length), UNSEEN)
            record.add_steps(newest.layer, logits[..., columns.columns(queries.device)], newest.sinks)


def _seen(masks: Sequence[Tensor | None], row: int, length: int) -> Tensor:
    """bool `[1 or H, S, length]`: what the masks of some steps let a row of the batch see."""
    own = [
        torch.ones(1, 1, 0, dtype=torch.bool) if mask is None else mask[row if len(mask) > 1 else 0]
        for mask in masks
    ]
    widest = max(own, key=lambda seen: seen.shape[-1])
    padded = [
        torch.nn.functional.pad(seen.to(widest.device), (0, length - seen.shape[-1]), value=True)
        for seen in own
    ]
    return torch.cat([seen.expand(widest.shape[0], -1, -1) for seen in padded], dim=1)
