"""The untrained model `small`: a fresh vision tower and projector before a frozen language model.

The linear layers of the language model carry low-rank changes (LoRA, https://arxiv.org/abs/2106.09685),
which start at zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from avlprof.models.small.assemble import model_config
from avlprof.models.small.deltas import DOWN, UP
from avlprof.models.small.language import LanguageModel
from avlprof.tasks.pages.canvas import GRID, PATCH, SIDE

TOWER = {
    "hidden_size": 384,
    "intermediate_size": 1344,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 384,
}
MEAN, STD = 0.9, 0.3
RANK = 40
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """A frozen linear layer without bias, plus a trained change of low rank.

    `down [rank, in]` is random and `up [rank, out]` zero at first; the weight is `frozen + up.T @ down`.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.register_buffer("weight", weight)
        self.down = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rank, rows))

    def forward(self, inputs: Tensor) -> Tensor:
        """The changed layer; the weight is summed in full precision."""
        with torch.autocast(inputs.device.type, enabled=False):
            weight = torch.addmm(self.weight, self.up.T, self.down)
        return F.linear(inputs, weight)


def build(
    language: LanguageModel, tower: dict[str, int] | None = None, rank: int = RANK, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """The model in fp32, and what its export says about itself.

    Args:
        language: the frozen language model.
        tower: sizes of the vision tower, as `TOWER`, with which tests make a smaller one.
        rank: of the low-rank changes.
        seed: of all random weights.
    """
    torch.manual_seed(seed)
    about = {"vision": tower or TOWER, "mean": MEAN, "std": STD, "rank": rank}
    model = LlavaForConditionalGeneration(model_config(language, about))
    model.load_state_dict(language.weights(), strict=False)
    initialise_tower(model.model.vision_tower)
    initialise_projector(model, model.get_input_embeddings().weight.std().item())
    model.requires_grad_(False)
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in _LINEAR:
                if hasattr(part, name):
                    setattr(part, name, LowRank(getattr(part, name).weight.detach(), rank))
    model.model.vision_tower.requires_grad_(True)
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model, about


@torch.no_grad()
def initialise_tower(tower: CLIPVisionModel) -> None:
    """Weights that keep variance, a wide patch convolution, and sines of the place of each patch.

    A tower that starts with CLIP's own initialisation did not learn to tell characters.
    """
    config = tower.config
    width, depth = config.hidden_size, config.num_hidden_layers
    for name, weight in tower.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif "layer" in name and weight.ndim == 2:
            last = name.endswith(("out_proj.weight", "fc2.weight"))  # they add to the residual stream
            weight.normal_(std=weight.shape[1] ** -0.5 / (math.sqrt(2 * depth) if last else 1.0))
    embeddings = tower.embeddings
    embeddings.patch_embedding.weight.normal_(std=0.05)
    embeddings.class_embedding.normal_(std=0.5)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:] = places(width)


def places(width: int) -> Tensor:
    """Sines and cosines of the row and column of each patch, `[GRID * GRID, width]`."""
    quarter = width // 4
    angle = torch.arange(GRID)[:, None] * 3.0 * 100.0 ** -(torch.arange(quarter) / quarter)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    down, across = axis[:, None].expand(GRID, GRID, -1), axis[None].expand(GRID, GRID, -1)
    return torch.cat([down, across], dim=-1).reshape(GRID * GRID, 4 * quarter)


@torch.no_grad()
def initialise_projector(model: LlavaForConditionalGeneration, size: float) -> None:
    """A start at which vision tokens are of the size of word embeddings, whose deviation is `size`."""
    projector = model.model.multi_modal_projector
    projector.linear_1.weight.normal_(std=projector.linear_1.weight.shape[1] ** -0.5)
    projector.linear_2.weight.normal_(std=1.5 * size * projector.linear_2.weight.shape[1] ** -0.5)
    for layer in (projector.linear_1, projector.linear_2):
        layer.bias.zero_()


def features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """The tower's last hidden states of the patches, `[B, patches, width]`, of uint8 `[B, H, W, 3]`."""
    pixels = ((images.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    hidden: Tensor = model.model.vision_tower(pixels).last_hidden_state
    return hidden[:, 1:]


def trained(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Everything that was trained, under the names that `avlprof.models.small.deltas` describes."""
    found = {}
    for name, value in model.state_dict().items():
        if "post_layernorm" in name:
            continue
        if "vision_tower" in name or "projector" in name:
            found[name] = value
        elif name.endswith((".up", ".down")):
            layer, _, end = name.rpartition(".")
            found[f"{layer}.weight{UP if end == 'up' else DOWN}"] = value
    return {name: value.detach().cpu() for name, value in found.items()}
