"""What a session remembers of one cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.modality import Modality

_AHEAD = 64  # positions of generated tokens that are marked ahead


class Passed:
    """The modality of every position that a cache has seen, and its decoding passes."""

    def __init__(self, modality: Tensor) -> None:
        self._marked, self.length, self.steps = modality, modality.shape[1], 0

    @property
    def modality(self) -> Tensor:
        """`[B, n]`."""
        return self._marked.narrow(1, 0, self.length)

    def step(self) -> None:
        """One more generated token a row."""
        self.steps += 1
        self.length += 1
        if self.length > self._marked.shape[1]:
            self._marked = pad(self._marked, (0, _AHEAD), value=int(Modality.GENERATED))

    def turn(self, modality: Tensor) -> None:
        """A turn with tokens `[B, m]`."""
        self.steps += 1
        self._marked = torch.cat([self.modality, modality], dim=1)
        self.length = self._marked.shape[1]
