"""Weights in 8 bits: each row of a matrix as whole numbers from -127 to 127, with a scale of its own.

A file holds what was trained beside a frozen language model, under the names that transformers has for
them. A low-rank change of a weight `W [out, in]` is two matrices, `W.up [rank, out]` and `W.down
[rank, in]`; `up.T @ down` is added. Matrices are int8 with a scale per row (`NAME.scale`, fp16); vectors
are fp16 as they are. The file's metadata holds, as JSON, what cannot be read off the shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from avlprof.errors import UserError
from avlprof.files import replacing

FILE: Final = "deltas.safetensors"
UP, DOWN, SCALE = ".up", ".down", ".scale"
_LEVELS = 127


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8, and the fp16 scale of each; a weight of more dimensions counts as rows of its first.

    Args:
        weight: `[rows, ...]`.

    Returns:
        int8 of the same shape, and fp16 `[rows]`; `int8 * scale` is nearest to the weight.
    """
    rows = weight.float().flatten(1)
    # the scale is rounded first, so that the numbers are nearest for the scale that is stored
    scale = (rows.abs().amax(1) / _LEVELS).half().clamp(min=torch.finfo(torch.float16).tiny)
    numbers = (rows / scale.float()[:, None]).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return numbers.view(weight.shape), scale


def dequantised(numbers: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weight of what `quantised` gave."""
    return numbers.float() * scale.float().view(-1, *[1] * (numbers.ndim - 1))


def save_deltas(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write trained tensors: matrices in 8 bits, vectors in fp16."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            stored[name], stored[name + SCALE] = (part.contiguous() for part in quantised(tensor))
        else:
            stored[name] = tensor.half().contiguous()
    with replacing(path) as partial:
        save_file(stored, partial, metadata={"about": json.dumps(about)})


def load_deltas(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """fp32 tensors by name, and what the file says about itself.

    Raises:
        UserError: the file cannot be read, or is of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"deltas {path} cannot be read ({type(error).__name__}); get the file again"
        ) from None
    tensors = {
        name: dequantised(tensor, stored[name + SCALE]) if tensor.dtype == torch.int8 else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }
    return tensors, about


def merged(weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with every low-rank change added, and beside them what the deltas hold whole."""
    whole = {name: tensor for name, tensor in deltas.items() if not name.endswith((UP, DOWN))}
    out = dict(weights) | whole
    for name in deltas:
        if name.endswith(UP):
            weight = name.removesuffix(UP)
            out[weight] = torch.addmm(weights[weight], deltas[name].T, deltas[weight + DOWN])
    return out
