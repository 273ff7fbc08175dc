"""KeyDiff's score: keys unlike the average key."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.scorers._base import Prefill, Scorer


@dataclass(frozen=True)
class KeyDiversity(Scorer):
    """Negative cosine similarity of a key with the mean direction of the row's vision keys.

    Needs no queries, so it does not favour what the last prompt token happens to look at.
    Source: KeyDiff, arXiv 2504.15364 (there over all keys of a text prompt).
    """

    def score(self, prefill: Prefill) -> Tensor:
        direction = F.normalize(prefill.key.float(), dim=-1)
        vision = (prefill.modality == Modality.VISION)[:, None, :, None]
        mean = (direction * vision).sum(dim=2, keepdim=True) / vision.sum(dim=2, keepdim=True).clamp(min=1)
        likeness = (direction * F.normalize(mean, dim=-1)).sum(dim=-1)
        return -likeness.repeat_interleave(prefill.query.shape[1] // prefill.key.shape[1], dim=1)
