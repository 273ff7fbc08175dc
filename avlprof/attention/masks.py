"""Attention masks in all the forms that models hand over, as booleans; padding read off them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avlprof.attention.call import AttentionCall
from avlprof.errors import UserError


def plain_mask(mask: Any, query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor | None:
    """A mask as booleans `[B, 1 or H, q, n]`, True where a row may look, or None: `is_causal` decides.

    Flash and flex attention get padding and windows by other ways than a mask of all pairs; there
    padding is left to who knows it, and a window is spelled out.

    Raises:
        UserError: the mask adds numbers of its own to the logits.
    """
    if isinstance(mask, Tensor) and mask.ndim == 4:
        if mask.dtype == torch.bool:
            return mask
        plain = mask == 0
        one = query.shape[2] == 1  # a step, which waits for no value: its prompt was asked
        if not one and not bool((plain | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            raise UserError(
                "this model's attention mask adds numbers of its own to the logits, which cannot be followed"
            )
        return plain
    window = options.get("sliding_window")
    if window is None or (mask is None and not _is_windowed(query, key, window)):
        return None
    rows = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)[:, None]
    columns = torch.arange(key.shape[2], device=key.device)
    seen: Tensor = ((columns <= rows) & (columns > rows - window))[None, None]
    return seen


def _is_windowed(query: Tensor, key: Tensor, window: int) -> bool:
    """Whether a window hides keys that were handed over, of which no mask tells."""
    return query.shape[2] > 1 and key.shape[2] > window


def padding_mask(values: dict[str, Any], past: int) -> Tensor | None:
    """Which tokens are no padding, `[B, n]`, of the attention mask in whatever form `generate` made it.

    Static caches come with a mask of all pairs, or one of each kind of layer: its last row sees
    every token that is none.
    """
    mask = values.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask if isinstance(mask, Tensor) else None
    tokens = values.get("input_ids")
    tokens = values.get("inputs_embeds") if tokens is None else tokens
    length = past + (tokens.shape[1] if tokens is not None else mask.shape[2])
    last = mask[:, 0, -1, :length]
    return (last if last.dtype == torch.bool else last == 0).long()


def check_causal(mask: Any, padding: Tensor | None, past: int) -> None:
    """`UserError` when a mask of all pairs is not a causal one with padding, which a policy builds anew."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or padding is None:
        return
    seen = (mask if mask.dtype == torch.bool else mask == 0)[..., : padding.shape[1]]
    rows = torch.arange(past, past + seen.shape[2], device=seen.device)[:, None]
    causal = torch.arange(padding.shape[1], device=seen.device) <= rows
    real = padding.bool()
    usual = causal[None, None] & real[:, None, None]
    if not bool(((seen == usual) | ~real[:, None, rows[:, 0], None]).all()):
        raise UserError(
            "an attention_mask of all pairs that is not causal cannot run under a policy; give one of "
            "[batch, tokens]"
        )


def as_long_as(call: AttentionCall, seen: int) -> AttentionCall:
    """A call over the tokens seen so far: static caches hand over their whole, half-empty buffers."""
    if call.key.shape[2] <= seen or call.positions is not None:
        return call
    whole = call
    mask = call.mask[..., :seen] if call.mask is not None else None
    kernel = call.kernel

    def stock(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, cut: Any, **options: Any) -> Any:
        if cut is mask:  # as it came: a kernel may want the buffers whole
            return kernel(module, query, whole.key, whole.value, whole.mask, **options)
        return kernel(module, query, key, value, cut, **options)

    return call._replace(key=call.key[:, :, :seen], value=call.value[:, :, :seen], mask=mask, kernel=stock)
