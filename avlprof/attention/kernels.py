"""The attention function that a model had before it was switched."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avlprof.attention.call import Kernel
from avlprof.errors import UserError


def stock_kernel(decoder: nn.Module, name: str) -> Kernel:
    """The function behind an implementation's name; eager lives in the modeling file.

    Raises:
        UserError: the implementation is neither sdpa nor eager.
    """
    if name in ("eager", None):
        attention = next(
            (m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")), decoder
        )
        eager: Kernel | None = getattr(
            sys.modules[type(attention).__module__], "eager_attention_forward", None
        )
        if eager is None:
            raise UserError(f"{type(decoder).__name__} has no eager attention function; load it with sdpa")
        return _with_float_mask(eager)
    if name not in ("sdpa",):
        raise UserError(
            f"attention implementation '{name}' is not supported; load the model with sdpa or eager"
        )
    kernel: Kernel = ALL_ATTENTION_FUNCTIONS[name]
    return kernel


def explicit_mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask that transformers gives eager attention, as booleans: causal rows are spelled out.

    Without one sdpa follows `module.is_causal`, which eager functions never read; on a model that
    says False the two differ.
    """
    mask: Tensor | None = sdpa_mask(*args, **options | {"allow_is_causal_skip": False})
    return mask


def _with_float_mask(eager: Kernel) -> Kernel:
    """Eager functions add a float mask."""

    def run(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if mask is not None and mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        options.setdefault("dropout", 0.0)
        return eager(module, query, key, value, mask, **options)

    return run
