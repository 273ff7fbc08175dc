"""What the tower learns from: the label of each patch, and the language model's own words for it."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from avlprof.tasks.pages.canvas import CHARACTERS, KINDS, RANKS, SLOTS, PatchLabels
from avlprof.tasks.pages.words import COLORS, KNOWN_WORDS, OTHER_WORD
from tools.small_model.build import places

SIZES = (len(KINDS), len(COLORS) + 2, RANKS, len(KNOWN_WORDS), *[len(CHARACTERS) + 1] * SLOTS)
"""Classes of kind, colour, rank, word, and of each character of a patch."""

NAMES = tuple(field.name for field in fields(PatchLabels))
_TEXT = KINDS.index("text")


class PatchHeads(nn.Module):
    """Says of each patch what it shows; used in training alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(SIZES))
        nn.init.normal_(self.heads.weight, std=0.02)
        nn.init.zeros_(self.heads.bias)

    def forward(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and the share of patches that are right, by label.

        Args:
            features: `[B, patches, width]`.
            labels: the fields of `PatchLabels`, each with a batch in front.
        """
        logits = self.heads(self.norm(features)).flatten(0, 1).split(SIZES, dim=-1)
        kind, color, rank, word = (
            labels[name].flatten().long() for name in ("kind", "color", "rank", "word")
        )
        characters = labels["characters"].flatten(0, -2).long()
        shown, text = (kind > 0).float(), (kind == _TEXT).float()
        loss = (
            0.5 * _mean(_each(logits[0], kind), 0.15 + 0.85 * shown)
            + 0.4 * _mean(_each(logits[1], color), shown)
            + 0.25 * _mean(_each(logits[2], rank), shown)
            + 0.6 * _mean(_each(logits[3], word), text)
        )
        # that no further character follows counts less than which one does
        weights = text[:, None] * torch.where(characters > 0, 1.0, 0.3)
        each = torch.stack([_each(logits[4 + slot], characters[:, slot]) for slot in range(SLOTS)], dim=-1)
        loss = loss + 1.2 * _mean(each, weights)
        first = logits[4].argmax(-1) == characters[:, 0]
        right = {
            "kind": _mean(logits[0].argmax(-1) == kind, shown),
            "color": _mean(logits[1].argmax(-1) == color, shown),
            "rank": _mean(logits[2].argmax(-1) == rank, shown),
            "word": _mean(logits[3].argmax(-1) == word, text),
            "character": _mean(first, text),
        }
        return loss, {name: value.detach() for name, value in right.items()}


def _each(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="none")


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1)


class WordTargets(nn.Module):
    """For each patch a sum of word embeddings: its kind, colour, word and characters, and its place.

    A projector that is drawn towards them puts vision tokens where the language model's words lie,
    which is a better start than anywhere.
    """

    def __init__(self, tokenizer: Tokenizer, embeddings: Tensor) -> None:
        super().__init__()

        def mean(text: str) -> Tensor:
            return embeddings[tokenizer.encode(text, add_special_tokens=False).ids].mean(0)

        nothing = torch.zeros_like(embeddings[0])
        kinds = [mean(" empty"), *(mean(f" {kind}") for kind in KINDS[1:])]
        colors = [nothing, *(mean(f" {color}") for color in (*COLORS, "white"))]
        words = [nothing] * (OTHER_WORD + 1)
        words += [mean(f" {word}") for word in list(KNOWN_WORDS)[OTHER_WORD + 1 :]]
        letters = torch.stack([nothing, *(mean(character) for character in CHARACTERS)])
        self.size = embeddings.std().item()
        self.register_buffer("kind", torch.stack(kinds))
        self.register_buffer("color", torch.stack(colors))
        self.register_buffer("word", torch.stack(words))
        # rolled by another number in each slot, so that the order of characters shows in their sum
        rolled = [torch.roll(letters, 97 * slot, dims=-1) for slot in range(SLOTS)]
        self.register_buffer("characters", torch.stack(rolled))
        self.register_buffer("place", places(embeddings.shape[1]) * self.size * 0.5)

    def forward(self, labels: dict[str, Tensor]) -> Tensor:
        """`[B, patches, width]` of the labels of a batch."""
        kind, color, word = (labels[name].flatten(1).long() for name in ("kind", "color", "word"))
        characters = labels["characters"].flatten(1, 2).long()
        letters = sum(self.characters[slot][characters[..., slot]] for slot in range(SLOTS))
        target: Tensor = (
            0.7 * self.kind[kind] + self.color[color] + self.word[word] + 0.7 * letters + self.place
        )
        return target

    def loss(self, projected: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean squared distance to the targets, in units of the embeddings' variance."""
        return F.mse_loss(projected.float(), self(labels)) / self.size**2
