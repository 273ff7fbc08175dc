"""Which samples are answered together, and their encoded batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from avlprof.models import LoadedModel
from avlprof.policy import PicturePolicy
from avlprof.tasks import Sample

if TYPE_CHECKING:
    from avlprof.evaluation.answers import AnswerSettings


@dataclass
class EncodedBatches:
    """Batches that were encoded, for the next policy that answers them; `most` bytes of them.

    Of one model and its processor alone, and apart for each way of making pictures smaller.
    """

    most: int = 1 << 28
    _known: dict[tuple[PicturePolicy | None, tuple[str, ...]], dict[str, Tensor]] = field(
        default_factory=dict
    )
    _bytes: int = 0

    def of(
        self, loaded: LoadedModel, samples: Sequence[Sample], pictures: PicturePolicy | None = None
    ) -> dict[str, Tensor]:
        """The batch of these samples, encoded by a model whose pictures were made smaller so."""
        ids = pictures, tuple(sample.id for sample in samples)
        if ids in self._known:
            return dict(self._known[ids])
        encoding = loaded.adapter.encode_samples(samples)
        size = sum(part.nbytes for part in encoding.values())
        if self._bytes + size <= self.most:
            self._known[ids] = dict(encoding)
            self._bytes += size
        return encoding

    def forget(self) -> None:
        """Let go of all of them."""
        self._known, self._bytes = {}, 0


def prompt_lengths(loaded: LoadedModel, samples: Sequence[Sample]) -> dict[str, int]:
    """Tokens of each sample's prompt, by id; every picture is opened and processed for it."""
    return {
        sample.id: int(loaded.adapter.encode_samples([sample])["input_ids"].shape[1]) for sample in samples
    }


def answer_batches(
    loaded: LoadedModel, samples: Sequence[Sample], settings: AnswerSettings
) -> Iterator[Sequence[Sample]]:
    """Samples of like prompt length, so many at a time as settings say.

    A batch decodes until its longest answer ends, so among prompts of like length (within a third) those
    whose answers are known, or for their kind of question expected, to be as long come together, the
    longest first.
    """
    size = settings.batch_size
    if size > 1 and len(samples) > size:
        known = settings.lengths or prompt_lengths(loaded, samples)

        def alike(sample: Sample) -> tuple[int, int, str, int]:
            length, said = known[sample.id], settings.said.get(sample.id, 0)
            return round(math.log(max(length, 1), _LIKE)), -said, sample.group, length

        samples = sorted(samples, key=alike)
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


_LIKE = 4 / 3
