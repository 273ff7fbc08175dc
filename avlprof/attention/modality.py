"""Which modality every position of a prompt belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from avlprof.errors import UserError
from avlprof.policy import GROUP, PromptShape


class Modality(IntEnum):
    """Codes of a modality map. `SYSTEM` is all text before the first vision token."""

    PAD = -1
    SYSTEM = 0
    VISION = 1
    TEXT = 2
    GENERATED = 3


_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
MODALITIES = ("system", "vision", "text", "generated")


def vision_token_ids(config: Any) -> tuple[int, ...]:
    """Ids that stand for one vision token each in a processed prompt, from the model's config."""
    ids = tuple(
        dict.fromkeys(int(token) for name in _IDS if (token := getattr(config, name, None)) is not None)
    )
    if not ids:
        kind = getattr(config, "model_type", type(config).__name__)
        raise UserError(f"model type '{kind}' has no vision tokens in its prompt; use a model that has")
    return ids


def modality_map(input_ids: Tensor, attention_mask: Tensor | None, vision_ids: Sequence[int]) -> Tensor:
    """Modality of each prompt position.

    Args:
        input_ids: `[B, N]` processed prompt, one id per vision token.
        attention_mask: `[B, N]`, 0 on padding; None means no padding.
        vision_ids: ids of vision tokens.

    Returns:
        int8 `[B, N]` of `Modality` codes. In a row without vision tokens all text is system.
    """
    vision = torch.isin(input_ids, torch.tensor(list(vision_ids), device=input_ids.device))
    seen = vision.cumsum(dim=1) > 0
    codes = torch.full_like(input_ids, Modality.SYSTEM, dtype=torch.int8)
    codes[seen] = Modality.TEXT
    codes[vision] = Modality.VISION
    if attention_mask is not None:
        codes[attention_mask[:, : codes.shape[1]] == 0] = Modality.PAD
    return codes


def turn_map(
    input_ids: Tensor, attention_mask: Tensor | None, vision_ids: Sequence[int], before: Tensor
) -> Tensor:
    """Modality of the tokens of a further turn, int8 `[B, n]`.

    Args:
        input_ids: `[B, n]` ids of the turn.
        attention_mask: `[B, N + n]` over the whole conversation; None means no padding.
        vision_ids: ids of vision tokens.
        before: `[B, N]` map of what has passed. Text is system as long as no vision token came.
    """
    new = input_ids.shape[1]
    codes = modality_map(input_ids, None, vision_ids)
    seen = (before == Modality.VISION).any(dim=1, keepdim=True)
    codes = torch.where(seen & (codes == Modality.SYSTEM), codes.new_tensor(int(Modality.TEXT)), codes)
    if attention_mask is not None and attention_mask.ndim == 2:
        codes[attention_mask[:, -new:] == 0] = Modality.PAD
    return codes


def prompt_shapes(
    modality: Tensor, governed: tuple[int, ...] | None = None, group: int = GROUP
) -> list[PromptShape]:
    """Token counts of each row of a modality map (padding is not counted); the rest as in `PromptShape`."""
    counts = [
        (modality == code).sum(dim=1).tolist() for code in (Modality.SYSTEM, Modality.VISION, Modality.TEXT)
    ]
    return [PromptShape(a, b, c, governed, group) for a, b, c in zip(*counts, strict=True)]
