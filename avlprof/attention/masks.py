"""Attention masks in all the forms that models hand over, as booleans; padding read off them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avlprof.attention.call import AttentionCall
from avlprof.errors import UserError

_ODD = (
    "an attention_mask of all pairs that is neither causal nor what this model builds by itself cannot run "
    "under a policy; give one of [batch, tokens]"
)


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

    Static caches come with a mask of all pairs, or one of each kind of layer. A token of this pass that
    is none sees itself, in a window too; earlier ones are those that the last row sees.
    """
    mask = values.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask if isinstance(mask, Tensor) else None
    tokens = values.get("input_ids")
    tokens = values.get("inputs_embeds") if tokens is None else tokens
    new = tokens.shape[1] if tokens is not None else mask.shape[2]
    seen = mask[:, 0, -new:, : past + new]
    seen = seen if seen.dtype == torch.bool else seen == 0
    own = seen.diagonal(offset=past, dim1=1, dim2=2)
    return torch.cat([seen[:, -1, :past], own], dim=1).long()


def odd_mask(mask: Any, padding: Tensor | None, past: int) -> Tensor | None:
    """A mask of all pairs, bool `[B, 1, q, n]`, that is not a causal one with padding; else None.

    A policy has the model build its mask anew, so an odd one has to be what the model builds: see
    `check_built`.

    Raises:
        UserError: a step's row does not see all tokens.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or padding is None:
        return None
    seen = (mask if mask.dtype == torch.bool else mask == 0)[..., : padding.shape[1]]
    usual = _causal(seen.shape[2], past, padding)
    if _same(seen, usual, padding, past):
        return None
    if seen.shape[2] == 1:
        raise UserError(_ODD)
    return seen


def check_built(odd: Tensor, padding: Tensor, past: int, call: AttentionCall) -> None:
    """`UserError` when the mask that a model built anew is not the one that was given to it.

    Args:
        odd: what was given, bool `[B, 1, q, n]`.
        padding: which tokens are none, `[B, n]`.
        past: tokens before this pass.
        call: of a layer that attends to all tokens.
    """
    built = call.mask if call.mask is not None else _causal(odd.shape[2], past, padding)
    if built.shape[2:] != odd.shape[2:] or not _same(odd, built, padding, past):
        raise UserError(_ODD)


def _causal(rows: int, past: int, padding: Tensor) -> Tensor:
    """Which keys each of so many rows behind `past` tokens sees, bool `[B, 1, rows, n]`."""
    at = torch.arange(past, past + rows, device=padding.device)[:, None]
    causal = torch.arange(padding.shape[1], device=padding.device) <= at
    return causal[None, None] & padding.bool()[:, None, None]


def _same(one: Tensor, other: Tensor, padding: Tensor, past: int) -> bool:
    """Whether two masks agree on the rows that are no padding."""
    real = padding[:, None, past : past + one.shape[2], None].bool()
    return bool(((one == other) | ~real).all())


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
