"""What every scorer must satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.scorers import Prefill, Scorer


def random_prefill(
    lengths: tuple[int, ...] = (23, 17, 23), *, seed: int = 0, pad: int = 0, heads: int = 6, kv_heads: int = 2
) -> Prefill:
    """A layer right after prefill: rows of system, vision and text tokens, left-padded.

    `pad` adds that many padding columns on the left of every row.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + pad
    query = torch.randn(len(lengths), heads, width, 8, generator=generator)
    key = torch.randn(len(lengths), kv_heads, width, 8, generator=generator)
    value = torch.randn(len(lengths), kv_heads, width, 8, generator=generator)
    modality = torch.full((len(lengths), width), int(Modality.PAD), dtype=torch.int8)
    for row, length in enumerate(lengths):
        start = width - length
        modality[row, start:] = Modality.TEXT
        modality[row, start : start + 2] = Modality.SYSTEM
        modality[row, start + 2 : width - 4] = Modality.VISION
    return Prefill(query, key, value, modality, scaling=0.5, layer=1)


class ScorerConformance:
    """Inherit and define `make`; pytest then runs these tests."""

    def make(self) -> Scorer:
        """The scorer under test."""
        raise AssertionError("define make() in the inheriting class")

    def test_a_score_for_every_head_and_position(self) -> None:
        prefill = random_prefill()
        scores = self.make().score(prefill)
        assert scores.shape == prefill.query.shape[:3]
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()

    def test_it_tells_vision_tokens_apart(self) -> None:
        prefill = random_prefill()
        scores = self.make().score(prefill).mean(dim=1)
        vision = prefill.modality == Modality.VISION
        assert all(row[seen].unique().numel() > 1 for row, seen in zip(scores, vision, strict=True))

    def test_a_row_does_not_depend_on_the_batch(self) -> None:
        prefill = random_prefill()
        scores = self.make().score(prefill)
        for row in range(len(prefill.modality)):
            alone = self.make().score(_rows(prefill, row, 0))
            _same_where_real(scores[row], alone[0], prefill.modality[row])

    def test_padding_does_not_matter(self) -> None:
        prefill = random_prefill((19, 19))
        wide = random_prefill((19, 19), pad=5)
        for name in ("query", "key", "value"):
            getattr(wide, name)[:, :, 5:] = getattr(prefill, name)
        ranked = self.make().score(prefill).argsort(dim=-1)
        padded = self.make().score(wide)[..., 5:].argsort(dim=-1)
        assert torch.equal(ranked, padded)

    def test_the_same_twice(self) -> None:
        assert torch.equal(self.make().score(random_prefill()), self.make().score(random_prefill()))


def _rows(prefill: Prefill, row: int, start: int) -> Prefill:
    part = slice(row, row + 1)
    return Prefill(
        prefill.query[part, :, start:],
        prefill.key[part, :, start:],
        prefill.value[part, :, start:],
        prefill.modality[part, start:],
        prefill.scaling,
        prefill.layer,
        prefill.softcap,
    )


def _same_where_real(ours: Tensor, theirs: Tensor, modality: Tensor) -> None:
    real = modality != Modality.PAD
    torch.testing.assert_close(ours[:, real], theirs[:, real], atol=1e-5, rtol=1e-5)
