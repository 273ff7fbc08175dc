"""The measured rows of all prompts of a batch, as tables that kernels read on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.prompt import INSTRUCTION, LAST, MeasuredRows

KEY_BLOCK = 64
MOST_VISION = 1 << 15  # positions from the first to the last vision token: what a program can hold
_NEVER = 0x7FFFFFFF  # number among the text tokens of a token that is none


@dataclass(frozen=True)
class BatchRows:
    """What kernels read of the prompts of a batch, made once a prompt; `plans` are its rows' own, and
    `pictured` the positions of their vision tokens, on the host.

    All tables are int32. Of the keys: `codes [B, N]` of `Modality`, `order [B, N]` (number among the
    text tokens), `uniform [B, blocks]` (the code that all tokens of a block have, or -1), `first [B]`
    the first token's position, `vision [B]` the first vision token's, `span` from there to the last.
    Of the measured rows: `rows [B, R]` positions (-1: none), `bins [B, R, bounds]`, `kinds [B, R]` bit
    by bit, `slots` and `text_slots [B, R]` their numbers among the covered and the text rows.
    `covered [B, C]`, `got [B, G]` and `text_rows [B, Rt]` index rows; `covered_kinds [B, C]` and `marks
    [B, G]` (1 for the last row, 2 for text) say what they count for; `text_order [B, Rt]` is the text
    rows' own number among the text tokens.
    """

    plans: tuple[MeasuredRows, ...]
    pictured: tuple[Tensor, ...]
    codes: Tensor
    order: Tensor
    uniform: Tensor
    first: Tensor
    vision: Tensor
    rows: Tensor
    bins: Tensor
    kinds: Tensor
    slots: Tensor
    text_slots: Tensor
    covered: Tensor
    covered_kinds: Tensor
    got: Tensor
    marks: Tensor
    text_rows: Tensor
    text_order: Tensor
    shares: Tensor
    span: int

    @property
    def options(self) -> RecordOptions:
        """What is measured."""
        return self.plans[0].options

    @property
    def text(self) -> int:
        """Most text tokens of a row."""
        return max(len(plan.columns.text) for plan in self.plans)

    @property
    def fits(self) -> bool:
        """Whether the kernels can hold a row's vision tokens."""
        return self.span <= MOST_VISION

    @property
    def is_covered(self) -> bool:
        """Whether rows are measured for coverage, and there is something to cover."""
        return self.span > 0 and self.covered.shape[1] > 0

    @property
    def has_history(self) -> bool:
        """Whether the weights of text rows on text are wanted."""
        return self.options.history is not None and self.text_rows.shape[1] > 0

    @classmethod
    def of(cls, plans: Sequence[MeasuredRows], real: Tensor, device: torch.device) -> BatchRows:
        """The rows of `plans`, whose tokens lie where bool `real [B, N]`, on the host, says."""
        at = [row.nonzero()[:, 0] for row in real]
        codes = torch.full(real.shape, int(Modality.PAD), dtype=torch.int32)
        order = torch.full(real.shape, _NEVER, dtype=torch.int32)
        for index, (plan, own) in enumerate(zip(plans, at, strict=True)):
            text = own[plan.columns.text.positions]
            codes[index, own] = plan.columns.codes.int()
            order[index, text] = torch.arange(len(text), dtype=torch.int32)
        vision = [own[plan.columns.vision.positions] for plan, own in zip(plans, at, strict=True)]
        tables = {
            "codes": codes,
            "order": order,
            "uniform": _uniform(codes),
            "first": torch.tensor([int(own[0]) if len(own) else 0 for own in at]),
            "vision": torch.tensor([int(own[0]) if len(own) else 0 for own in vision]),
            "shares": torch.tensor(plans[0].options.coverages, dtype=torch.float32)
            .div(100)
            .view(torch.int32),
        }
        own_rows = [_row_tables(plan, own) for plan, own in zip(plans, at, strict=True)]
        tables |= {
            name: _padded([one[name] for one in own_rows], -1 if name in _INDEXES else 0)
            for name in own_rows[0]
        }
        there = _moved(tables, device)
        there["shares"] = there["shares"].view(torch.float32)
        span = max((int(own[-1] - own[0]) + 1 for own in vision if len(own)), default=0)
        return cls(plans=tuple(plans), pictured=tuple(vision), span=span, **there)


_INDEXES = ("rows", "slots", "text_slots", "covered", "got")


def _row_tables(plan: MeasuredRows, at: Tensor) -> dict[str, Tensor]:
    """The tables of one prompt whose tokens lie at `at [n]`."""
    kinds, cover, received = plan.marks
    covered, got = (marks.any(dim=0).nonzero()[:, 0] for marks in (cover, received))
    text_rows = received[INSTRUCTION].nonzero()[:, 0]
    columns, count = plan.columns, len(plan.rows)
    return {
        "rows": at[plan.rows],
        "bins": columns.bin_bounds(plan.rows),
        "kinds": _bits(kinds),
        "slots": _numbered(covered, count),
        "text_slots": _numbered(text_rows, count),
        "covered": covered,
        "covered_kinds": _bits(cover[:, covered]),
        "got": got,
        "marks": _bits(received[[LAST, INSTRUCTION]][:, got]),
        "text_rows": text_rows,
        "text_order": columns.order[plan.rows[text_rows]],
    }


def _uniform(codes: Tensor) -> Tensor:
    """`[B, blocks]`: the code of all tokens of a block of keys, or -1 where they differ."""
    blocks = torch.nn.functional.pad(codes, (0, -codes.shape[1] % KEY_BLOCK), value=int(Modality.PAD))
    blocks = blocks.view(len(codes), -1, KEY_BLOCK)
    most = blocks.amax(dim=-1)
    empty = blocks == int(Modality.PAD)
    same = ((blocks == most[..., None]) | empty).all(dim=-1)
    return torch.where(same, most, -1)


def _bits(marks: Tensor) -> Tensor:
    """bool `[K, R]` as numbers `[R]`, the first of them in the lowest bit."""
    return (marks.int() << torch.arange(len(marks), dtype=torch.int32)[:, None]).sum(dim=0)


def _numbered(chosen: Tensor, count: int) -> Tensor:
    """`[count]`: the number of each row among the chosen ones, -1 where it is none."""
    numbers = torch.full((count,), -1)
    numbers[chosen] = torch.arange(len(chosen))
    return numbers


def _padded(tables: Sequence[Tensor], value: int) -> Tensor:
    """Tables `[n, ...]` of different lengths, stacked."""
    return torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True, padding_value=value)


def _moved(tables: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tables on the device, as int32, in one copy."""
    flat = torch.cat([table.flatten().to(torch.int32) for table in tables.values()])
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = torch.split(flat.to(device, non_blocking=True), [table.numel() for table in tables.values()])
    return {name: part.view(table.shape) for (name, table), part in zip(tables.items(), parts, strict=True)}
