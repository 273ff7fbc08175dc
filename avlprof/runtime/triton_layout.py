"""A prompt's tokens chosen and laid out on the device: one kernel says which goes where, one moves them.

Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# kernels are compiled from their text: their arguments are pointers and constants, not Python objects

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.runtime.layout import RowPlan
from avlprof.runtime.triton_exchange import image_of, worst_of_best

_COLUMNS, _SLOTS = 2048, 16  # that a program takes at a time
_WARPS = 8  # of a program that chooses
_COUNTS = 6  # of a row
_SYSTEM = tl.constexpr(int(Modality.SYSTEM))
_VISION = tl.constexpr(int(Modality.VISION))
_TEXT = tl.constexpr(int(Modality.TEXT))
_NONE = tl.constexpr(int(Modality.PAD))


def prompt_order(
    scores: Tensor, modality: Tensor, plans: list[RowPlan], texts: list[int], lengths: tuple[int, int]
) -> Tensor:
    """Columns of a first prompt in the order of a layer's slots, in one launch.

    Of the vision tokens the best by score stay, and the best of these are the core, of equal ones the
    earlier; of the text, the first `sink` and the newest. A slot that a row leaves free names column 0.

    Args:
        scores: fp32 `[B, G, N]`.
        modality: `[B, N]` codes of `Modality`.
        plans: what each row keeps, its text as it is held after the prompt.
        texts: text tokens of each row's prompt.
        lengths: slots of the left part, and of the text part.

    Returns:
        int64 `[B, G, n]`, the slots of both parts.
    """
    batch, groups, columns = scores.shape
    left, width = lengths[0], sum(lengths)
    rows = [
        (p.system, p.vision, p.core, p.text, min(p.sink, p.text), text)
        for p, text in zip(plans, texts, strict=True)
    ]
    counts = torch.tensor(rows, dtype=torch.int32)
    if scores.is_cuda:
        counts = counts.pin_memory().to(scores.device, non_blocking=True)
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    modality = modality if modality.stride(-1) == 1 else modality.contiguous()
    order = torch.empty((batch, groups, width), dtype=torch.int64, device=scores.device)
    with torch.cuda.device(scores.device if scores.is_cuda else -1):
        order_columns[(batch * groups,)](
            scores, modality, counts, order, *scores.stride()[:2], modality.stride(0),
            groups, columns, left, width, fields=_COUNTS, block=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return order


def taken_slots(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    order: Tensor,
    room: int,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """New buffers of the tokens `order [B, G, n]`, and `room` more slots, in one launch.

    Args:
        key, value: `[B, H, N, D]` and `[B, H, N, E]`.
        positions: int64 `[B, G, N]`, `G` being 1 or `H`.
        order: int64, columns.
        room: slots that are free: zeros, at position -1.
        into: contiguous buffers of as many slots to use in place of new ones.

    Returns:
        Contiguous keys, values and positions of `n + room` slots.
    """
    batch, heads, _, size = key.shape
    groups, kept = order.shape[1:]
    capacity, value_size = kept + room, value.shape[3]
    key, value = (states if states.stride(-1) == 1 else states.contiguous() for states in (key, value))
    keys, values, places = into or (
        torch.empty((batch, heads, capacity, size), dtype=key.dtype, device=key.device),
        torch.empty((batch, heads, capacity, value_size), dtype=value.dtype, device=key.device),
        torch.empty((batch, groups, capacity), dtype=positions.dtype, device=key.device),
    )
    with torch.cuda.device(key.device if key.is_cuda else -1):
        take_columns[(triton.cdiv(capacity, _SLOTS), batch * heads)](
            key, value, positions, order.contiguous(), keys, values, places,
            *key.stride()[:3], *value.stride()[:3], *positions.stride(),
            heads, groups, kept, capacity, size, value_size,
            block=_SLOTS, width=triton.next_power_of_2(max(size, value_size)),
        )  # fmt: skip
    return keys, values, places


@triton.jit
def _put(order, column, mask, slot):
    """Name columns of a class in order, from a slot on; the slot behind them."""
    ones = mask.to(tl.int32)
    tl.store(order + slot + tl.cumsum(ones, axis=0) - 1, column.to(tl.int64), mask=ones != 0)
    return slot + tl.sum(ones, axis=0)


@triton.jit(do_not_specialize=["groups", "columns", "left", "slots"])
def order_columns(
    scores, modality, counts, order, score_b, score_g, modality_b, groups, columns, left, slots,
    fields: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The order of one row's set: stored, core, system, text, each in the order of its columns."""
    index = tl.program_id(0).to(tl.int64)
    b, g = index // groups, index % groups
    own = counts + b * fields
    system, vision, core = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    text, sink, texts = tl.load(own + 3), tl.load(own + 4), tl.load(own + 5)
    score, kinds = scores + b * score_b + g * score_g, modality + b * modality_b
    line = order + index * slots
    least, last = worst_of_best(score, kinds, kinds, 0, columns, vision, _VISION, False, block)
    core_least, core_last = worst_of_best(score, kinds, kinds, 0, columns, core, _VISION, False, block)
    at_stored, at_core, at_system, at_text = left - system - vision, left - system - core, left - system, left
    for at in range(0, at_stored, block):
        slot = at + tl.arange(0, block)
        tl.store(line + slot, tl.zeros([block], tl.int64), mask=slot < at_stored)
    for at in range(left + text, slots, block):
        slot = at + tl.arange(0, block)
        tl.store(line + slot, tl.zeros([block], tl.int64), mask=slot < slots)
    before = 0
    for at in range(0, columns, block):
        column = at + tl.arange(0, block)
        kind = tl.load(kinds + column, mask=column < columns, other=_NONE)
        image = image_of(tl.load(score + column, mask=column < columns, other=0.0))
        seen = (kind == _VISION) & (vision > 0)
        stays = seen & ((image > least) | ((image == least) & (column <= last)))
        best = (image > core_least) | ((image == core_least) & (column <= core_last))
        best = stays & best & (core > 0)
        at_stored = _put(line, column, stays & (best == 0), at_stored)
        at_core = _put(line, column, best, at_core)
        at_system = _put(line, column, kind == _SYSTEM, at_system)
        ones = (kind == _TEXT).to(tl.int32)
        age = before + tl.cumsum(ones, axis=0) - 1
        held = (kind == _TEXT) & ((age < sink) | (age >= texts - text + sink))
        at_text = _put(line, column, held, at_text)
        before += tl.sum(ones, axis=0)


@triton.jit(do_not_specialize=["heads", "groups", "kept", "capacity"])
def take_columns(
    key, value, positions, order, keys, values, places,
    key_b, key_h, key_n, value_b, value_h, value_n, position_b, position_h, position_n,
    heads, groups, kept, capacity, key_size, value_size, block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Some slots of one head of one row: the tokens that they hold, or nothing."""
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    own = tl.where(groups > 1, h, 0)
    slot = tl.program_id(0) * block + tl.arange(0, block)
    there, real = slot < capacity, slot < kept
    column = tl.load(order + (b * groups + own) * kept + slot, mask=real, other=0)
    line = index * capacity + slot
    d = tl.arange(0, width)
    x = tl.load(
        key + b * key_b + h * key_h + column[:, None] * key_n + d[None, :],
        mask=real[:, None] & (d < key_size)[None, :],
        other=0.0,
    )
    tl.store(keys + line[:, None] * key_size + d[None, :], x, mask=there[:, None] & (d < key_size)[None, :])
    x = tl.load(
        value + b * value_b + h * value_h + column[:, None] * value_n + d[None, :],
        mask=real[:, None] & (d < value_size)[None, :],
        other=0.0,
    )
    tl.store(
        values + line[:, None] * value_size + d[None, :], x, mask=there[:, None] & (d < value_size)[None, :]
    )
    if h < groups:
        place = tl.load(
            positions + b * position_b + h * position_h + column * position_n, mask=real, other=-1
        )
        tl.store(places + (b * groups + h) * capacity + slot, place, mask=there)
