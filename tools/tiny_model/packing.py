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
from transformers import PreTrainedModel

from avlprof.tasks.shapes.questions import QUESTIONS
from avlprof.tasks.shapes.scene import Scene
from tools.tiny_model.recipe import ANSWER_ROOM, Recipe

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
    positions: Tensor  # int64 [axes, tokens]
    segments: list[int]  # 0 = prefix
    weights: list[float]  # of the loss on predicting this token; 0 on prompts


def pack(scene: Scene, recipe: Recipe, rng: np.random.Generator) -> Packed:
    """A picture's tokens and `ANSWER_ROOM` tokens of questions and answers about it."""
    tokenizer = recipe.processor.tokenizer

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    prefix = recipe.prefix(scene.frame)
    ids, following = list(prefix.ids), list[int]()
    segments, weights = [0] * len(ids), [0.0] * len(ids)
    names = list(WEIGHTS)
    chance = np.array([WEIGHTS[n] for n in names]) / sum(WEIGHTS.values())
    for segment in range(1, 64):
        asked = QUESTIONS[str(rng.choice(names, p=chance))](scene, rng)
        if asked is None:
            continue
        prompt = encode(f"\n{asked[0]} ASSISTANT:")
        answer = [*encode(f" {asked[1]}"), tokenizer.eos_token_id]
        length = len(prompt) + len(answer)
        if len(following) + length > ANSWER_ROOM - (len(prefix.ids) - prefix.ids.count(recipe.image_id)):
            break
        ids += prompt + answer
        following += range(prefix.next, prefix.next + length)
        segments += [segment] * length
        weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
    behind = torch.tensor(following).expand(len(prefix.positions), -1)
    return Packed(ids, torch.cat([prefix.positions, behind], dim=1), segments, weights)


def collate(batch: list[Packed], pad: int) -> dict[str, Tensor]:
    """Right-padded tensors: ids, weights `[B, S]`, positions `[axes, B, S]`, a bool mask `[B, 1, S, S]`."""
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
        "positions": torch.stack([F.pad(p.positions, (0, length - len(p.ids))) for p in batch], dim=1),
        "weights": weights,
        "mask": (seen & causal)[:, None],
    }


def answer_logits(
    model: PreTrainedModel, vision: Tensor, sequences: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[tokens, vocabulary]` of all answer tokens of a batch, the tokens, and their weights.

    Args:
        model: a LLaVA or a Qwen2.5-VL.
        vision: projected features of the pictures, `[B, patches, hidden]`.
        sequences: what `collate` gives.
    """
    inner, ids, positions = model.model, sequences["ids"], sequences["positions"]
    embeds = inner.get_input_embeddings()(ids)
    at = ids == model.config.image_token_id
    hidden = inner.language_model(
        inputs_embeds=embeds.masked_scatter(at[..., None], vision.to(embeds.dtype)),
        position_ids=positions[0] if len(positions) == 1 else positions,
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
