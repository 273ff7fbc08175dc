"""One layer's decoding steps, measured some at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.attention.weights import softmax
from avlprof.tracing import statistics
from avlprof.tracing.columns import UNSEEN, Columns, row_values
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.statistics import history
from avlprof.tracing.sums import Sums

STEPS_AT_ONCE = 32  # decoding steps measured at once, at most
MOST_LOGITS = 1 << 18  # of steps that are measured together


class LayerSteps:
    """Logits of decoding steps held back, and what the measured ones came to.

    `scores` are weights on vision, fp32 `[S, H, V]` each, in host memory: they are all that grows
    with the length of an answer. `history` fp64 `[H, T]` are sums over the steps, if asked for.
    Without `per_head` H is 1, the mean over heads.
    """

    def __init__(self, options: RecordOptions) -> None:
        self.sums = Sums({"generated": 0})
        self.scores: list[Tensor] = []
        self.history: Tensor | None = None
        self._options = options
        self._waiting: list[Tensor] = []
        self._sinks: Tensor | None = None
        self._tops: Tensor | None = None
        self._blind = 0

    @property
    def seeing(self) -> bool:
        """Whether there was a picture to look at in some step."""
        return bool(self.scores)

    def blind(self, heads: int) -> Tensor:
        """Weights `[S, heads, 0]` of the steps before the first picture."""
        return torch.zeros(self._blind, heads, 0)

    def hold(self, logits: Tensor, sinks: Tensor | None) -> bool:
        """Take logits `[H, n]` of a step over all tokens so far; whether it is time to measure.

        `sinks [H]` are the layer's learned ones, the same in all steps.
        """
        self._waiting.append(logits)
        self._sinks = None if sinks is None else sinks.view(-1, 1, 1)
        count = len(self._waiting)
        most = self._options.step_logits or MOST_LOGITS
        return count >= STEPS_AT_ONCE or count * logits.numel() > most

    def measure(self, columns: Columns) -> None:
        """Measure the held steps at once, and let go of them; `columns` cover the newest."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        heads, length = waiting[-1].shape
        logits = waiting[-1].new_full((heads, len(waiting), length), UNSEEN)
        for step, seen in enumerate(waiting):
            logits[:, step, : seen.shape[1]] = seen
        rows = torch.tensor([seen.shape[1] - 1 for seen in waiting])
        self._measure(logits, rows, columns)

    def measure_block(self, logits: Tensor, sinks: Tensor | None, columns: Columns) -> None:
        """Measure logits `[H, S, n]` of consecutive steps, the newest over all of `columns`."""
        self.measure(columns)
        self._sinks = None if sinks is None else sinks.view(-1, 1, 1)
        length = logits.shape[2]
        self._measure(logits, torch.arange(length - logits.shape[1], length), columns)

    def _measure(self, logits: Tensor, rows: Tensor, columns: Columns) -> None:
        """Add steps, by logits `[H, S, n]`; `rows [S]`, on the host, are the positions of their tokens."""
        heads, steps, _ = logits.shape
        weights = softmax(logits, self._sinks)
        values, text = row_values(logits, weights, columns, columns.bins(rows), self._sinks is not None)
        every = torch.ones(1, steps, dtype=torch.float64, device=weights.device)
        whole = slice(0, heads)
        self.sums.kinds["generated"] += steps
        self.sums.add(values, every, whole, heads)
        if self._options.history is not None:
            order = columns.order[rows].to(weights.device)
            self._add_history(self._kept(history(text, order, self._options.history, decoding=True)))
        if not len(columns.vision):
            self._blind += steps
            return
        vision = columns.vision.of_first(weights)
        ordered = statistics.descending(vision)
        self.sums.add_coverage(statistics.coverage(ordered, columns.shares), every, whole, heads)
        self.scores.append(_on_host(self._kept(vision).transpose(0, 1)))
        self._add_overlaps(statistics.top_sets(vision, self._options.top_share, ordered))

    def _kept(self, values: Tensor) -> Tensor:
        """`[H, ...]` as they are stored: of every head, or their mean `[1, ...]`."""
        return values if self._options.per_head else values.mean(dim=0, keepdim=True)

    def _add_overlaps(self, now: Tensor) -> None:
        """Compare the top sets `[H, S, V]` of these steps with those `lags` steps before each."""
        lags = self._options.lags
        if self._tops is not None and self._tops.shape[-1] != now.shape[-1]:
            self._tops = None  # sets of more tokens, since a picture has come
        tops = now if self._tops is None else torch.cat([self._tops, now], dim=1)
        if self.sums.overlap is None:
            self.sums.overlap = torch.zeros(len(now), 1, len(lags), dtype=torch.float64, device=now.device)
            self.sums.pairs = [0] * len(lags)
        shared, count = statistics.set_overlaps(tops), tops.shape[1]
        sums = []
        for index, lag in enumerate(lags):
            # a lag's pairs are a diagonal; those whose later step is old have been counted
            pairs = shared.diagonal(-lag, dim1=1, dim2=2) if lag < count else shared[:, 0, :0]
            pairs = pairs[:, max(count - now.shape[1] - lag, 0) :]
            sums.append(pairs.sum(dim=1))
            self.sums.pairs[index] += pairs.shape[1]
        if sums:
            self.sums.overlap += torch.stack(sums, dim=-1)[:, None]
        self._tops = tops[:, -max(lags, default=1) :]

    def _add_history(self, added: Tensor) -> None:
        if self.history is None:
            self.history = added
        else:
            grown = added.shape[-1] - self.history.shape[-1]
            self.history = torch.nn.functional.pad(self.history, (0, grown)) + added


def _on_host(values: Tensor) -> Tensor:
    """A copy in host memory; of a device's values it is there once the device has got so far."""
    if values.device.type != "cuda":
        return values.contiguous().cpu()  # a view would hold on to the weights of all keys
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
