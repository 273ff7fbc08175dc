"""Where a row of a batch has its tokens, between padding."""

from __future__ import annotations

import torch
from torch import Tensor


class Places:
    """The columns of one row that hold tokens; bool `real [n]`, on the host, marks them."""

    def __init__(self, real: Tensor) -> None:
        self._index = real.nonzero()[:, 0]
        self._total = len(real)
        first = int(self._index[0]) if len(self._index) else 0
        without_gap = len(self._index) > 0 and int(self._index[-1]) - first == len(self._index) - 1
        self._run = slice(first, first + len(self._index)) if without_gap else None
        self._there: dict[torch.device, Tensor] = {}

    def grow(self, real: Tensor) -> None:
        """Further columns follow."""
        self._there = {}
        if self._run is not None and self._run.stop == self._total and bool(real.all()):
            self._run = slice(self._run.start, self._total + len(real))
        else:
            self._index = self._places()
            self._index = torch.cat([self._index, real.nonzero()[:, 0] + self._total])
            self._run = None
        self._total += len(real)

    def columns(self, device: torch.device) -> Tensor | slice:
        """All of them: a slice, which copies nothing, where they have no gap."""
        if self._run is not None:
            return self._run
        if device not in self._there:
            self._there[device] = self._index.to(device, non_blocking=True)
        return self._there[device]

    def _places(self) -> Tensor:
        return self._index if self._run is None else torch.arange(self._run.start, self._run.stop)
