"""What the key columns of a sample are: their modalities, and where vision and text lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.tracing import statistics
from avlprof.tracing.options import RecordOptions


@dataclass(frozen=True)
class Columns:
    """The keys of one sample, in order and without padding.

    `codes [N]` are `Modality` codes and stay in host memory, so that places and counts can be
    read without waiting for a device; what rows are measured with lies on `device`.
    """

    codes: Tensor
    device: torch.device
    options: RecordOptions

    @property
    def count(self) -> int:
        """Keys in all."""
        return len(self.codes)

    @cached_property
    def groups(self) -> Tensor:
        """fp32 `[5, N]`: 1 on keys of each modality, and on the first position."""
        hot = (self.codes == torch.arange(4, dtype=self.codes.dtype)[:, None]).float()
        first = torch.zeros(1, self.count)
        first[:, :1] = 1.0
        return torch.cat([hot, first]).to(self.device, non_blocking=True)

    @cached_property
    def order(self) -> Tensor:
        """int64 `[N]`, on the host: number of text and generated tokens up to each position, less one."""
        return self._is_text.long().cumsum(dim=0) - 1

    @cached_property
    def shares(self) -> Tensor:
        """fp64 levels of coverage."""
        return (torch.tensor(self.options.coverages, dtype=torch.float64) / 100).to(
            self.device, non_blocking=True
        )

    def bins(self, rows: Tensor) -> Tensor:
        """`statistics.distance_bins` of the rows at these places, which lie on the host."""
        count = len(self.text)
        first = min(self.options.text_sink, count)
        found = statistics.distance_bins(self.order[rows], self.options.distances, first, count)
        return found.to(self.device, non_blocking=True)

    @cached_property
    def vision(self) -> Selection:
        """The vision tokens."""
        return Selection.of(self.codes == Modality.VISION, self.device)

    @cached_property
    def text(self) -> Selection:
        """Text of the prompt behind the first picture, and generated tokens."""
        return Selection.of(self._is_text, self.device)

    @cached_property
    def _is_text(self) -> Tensor:
        return (self.codes == Modality.TEXT) | (self.codes == Modality.GENERATED)


@dataclass(frozen=True)
class Selection:
    """Some columns, ascending: a slice where they have no gap, which is a view instead of a copy."""

    places: Tensor  # on the host
    index: Tensor | slice

    @classmethod
    def of(cls, chosen: Tensor, device: torch.device) -> Selection:
        """The columns that bool `chosen [N]`, on the host, marks."""
        places = chosen.nonzero()[:, 0]
        if len(places) and int(places[-1] - places[0]) == len(places) - 1:
            return cls(places, slice(int(places[0]), int(places[-1]) + 1))
        return cls(places, places.to(device, non_blocking=True))

    def __len__(self) -> int:
        return len(self.places)

    def of_first(self, values: Tensor) -> Tensor:
        """The chosen columns of `values [..., n]`, which holds the first n columns alone."""
        if isinstance(self.index, slice):
            return values[..., self.index]
        count = int(torch.searchsorted(self.places, values.shape[-1]))
        return values[..., self.index[:count]]
