"""Training batches for the embedded model: one image, many questions, one sequence.

The image prefix is encoded once and followed by several question-answer segments. Each
segment attends to the prefix and to itself only, and its positions restart behind the
prefix, so every segment is the forward pass of an ordinary single-question prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from avlprof.tasks.shapes.questions import QUESTIONS
from avlprof.tasks.shapes.scene import Scene

WEIGHTS = {
    "describe": 2.0,
    "read": 1.5,
    "colors": 1.0,
    "row": 1.5,
    "position": 1.5,
    "where": 2.0,
    "color": 2.0,
    "text_color": 2.0,
    "shape": 2.0,
    "text": 2.0,
    "count": 0.7,
    "exists": 1.0,
}


@dataclass(frozen=True)
class Packed:
    """One image's sequence. All arrays have one entry per token, the prefix included."""

    ids: list[int]
    positions: list[int]
    segments: list[int]  # 0 = prefix
    weights: list[float]  # of the loss on predicting this token; 0 on prompts


class Packer:
    """Turns scenes into packed sequences of at most `length` tokens."""

    def __init__(self, processor: LlavaProcessor, vision_tokens: int, length: int) -> None:
        self._tokenizer = processor.tokenizer
        image = self._tokenizer.convert_tokens_to_ids("<image>")
        head = self._tokenizer("USER: <image>").input_ids
        at = head.index(image)
        self._prefix = head[:at] + [image] * vision_tokens + head[at + 1 :]
        self._length = length

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Packed:
        ids, positions = list(self._prefix), list(range(len(self._prefix)))
        segments, weights = [0] * len(ids), [0.0] * len(ids)
        names = list(WEIGHTS)
        chance = np.array([WEIGHTS[n] for n in names]) / sum(WEIGHTS.values())
        for segment in range(1, 64):
            asked = QUESTIONS[str(rng.choice(names, p=chance))](scene, rng)
            if asked is None:
                continue
            prompt = self._encode(f"\n{asked[0]} ASSISTANT:")
            answer = [*self._encode(f" {asked[1]}"), self._tokenizer.eos_token_id]
            if len(ids) + len(prompt) + len(answer) > self._length:
                break
            ids += prompt + answer
            positions += range(len(self._prefix), len(self._prefix) + len(prompt) + len(answer))
            segments += [segment] * (len(prompt) + len(answer))
            weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
        return Packed(ids, positions, segments, weights)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def collate(batch: list[Packed], pad: int) -> dict[str, Tensor]:
    """Right-padded tensors: ids, positions, weights `[B, S]` and a bool mask `[B, 1, S, S]`."""
    length = max(len(p.ids) for p in batch)

    def stack(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    segments = stack([p.segments for p in batch], -1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    weights = torch.zeros(len(batch), length)
    for i, packed in enumerate(batch):
        weights[i, : len(packed.weights)] = torch.tensor(packed.weights)
    return {
        "ids": stack([p.ids for p in batch], pad),
        "positions": stack([p.positions for p in batch], 0),
        "weights": weights,
        "mask": (seen & causal)[:, None],
    }


def answer_logits(
    model: LlavaForConditionalGeneration, features: Tensor, sequences: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[tokens, vocabulary]` of all answer tokens of a batch, the tokens, and their weights.

    Args:
        model: any LLaVA.
        features: the tower's, `[B, patches, width]`.
        sequences: what `collate` gives.
    """
    inner, ids = model.model, sequences["ids"]
    embeds = inner.get_input_embeddings()(ids)
    vision = inner.multi_modal_projector(features).to(embeds.dtype)
    at = ids == model.config.image_token_id
    hidden = inner.language_model(
        inputs_embeds=embeds.masked_scatter(at[..., None], vision),
        position_ids=sequences["positions"],
        attention_mask=sequences["mask"],
        use_cache=False,
    ).last_hidden_state
    weights = sequences["weights"][:, 1:]
    wanted = weights > 0
    return model.lm_head(hidden[:, :-1][wanted]), ids[:, 1:][wanted], weights[wanted]


def weighted_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy, each token with its weight."""
    each = F.cross_entropy(logits.float(), target, reduction="none")
    return (each * weights).sum() / weights.sum()
