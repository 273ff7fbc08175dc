"""Bright spots in grey pictures, and where the tokens of a tile lie."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

GREY, BRIGHT = 180, 250


def silence(module, args, out):
    """A forward hook that stills an attention module."""
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


def silence_tower(model):
    """In the vision tower of `model` no patch attends to another any more."""
    tower = next(
        module
        for part, module in model.named_modules()
        if part.rsplit(".", 1)[-1] in ("vision_tower", "vision_model", "visual")
    )
    for module in tower.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(silence)


def flat(size):
    """A grey picture."""
    return Image.fromarray(np.full((size[1], size[0], 3), GREY, dtype=np.uint8))


def spotted(size, box):
    """A grey picture with a bright box (left, top, right, bottom in pixels)."""
    pixels = np.full((size[1], size[0], 3), GREY, dtype=np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = BRIGHT
    return Image.fromarray(pixels)


def areas(tile):
    """Index, and left, top, right, bottom in shares of the picture, of each token of a tile."""
    left, top, right, bottom = tile.box
    wide, high = (right - left) / tile.columns, (bottom - top) / tile.rows
    for row, indices in enumerate(tile.tokens().tolist()):
        for column, index in enumerate(indices):
            x, y = left + column * wide, top + row * high
            yield index, (x, y, x + wide, y + high)
