"""What avlprof does with every image-text-to-text type of transformers, found by trying it.

A small random model of each type is traced and run under policies that keep everything. Nothing is
typed by hand: the words are those of the gate (`avlprof.attention.gate`) or of whoever refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avlprof.attention.gate import LayerRole, Role, check_traced, layer_roles
from avlprof.errors import UserError
from avlprof.policy import Policy, TextPolicy
from avlprof.runtime.apply import apply
from avlprof.testing.types import model_types, tiny_inputs, tiny_model, vision_ids
from avlprof.tracing import record
from avlprof.watch import SILENT, Watch

KEEP_ALL = Policy(name="everything, packed", text=TextPolicy(window=500))
STEPS, TOLERANCE = 3, 1e-3
Words = (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What stock models raise that need more than token ids, or a package that is not there."""


@dataclass(frozen=True)
class Verdict:
    """Whether a type of model can be traced, and run under policies.

    `traced` and `run` are `yes`, `no`, `4 of 6 layers` (policies act on the full-attention layers
    alone), or `not tried` where the stock model could not be run on token ids here. `why` says what
    stands against it, and `layers` what layers there are.
    """

    type: str
    traced: str
    run: str
    layers: str
    why: str


def verdicts(watch: Watch = SILENT) -> Iterator[Verdict]:
    """The verdict on each type, in the order of their names; takes about a minute in all."""
    names = sorted(model_types())
    for done, name in enumerate(names, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield verdict(name)
        watch.phase("types", done, len(names))


def verdict(name: str) -> Verdict:
    """The verdict on one type."""
    try:
        model = tiny_model(name)
    except Words as error:
        return Verdict(name, "not tried", "not tried", "", f"not built here: {_line(error)}")
    try:
        check_traced(model)
    except UserError as error:
        return Verdict(name, "no", "no", "", str(error))
    roles = layer_roles(model.config.get_text_config(decoder=True))
    layers = ", ".join(f"{_count(roles, role)} {role.name.lower()}" for role in Role if _count(roles, role))
    inputs = tiny_inputs(model)
    try:
        stock = _logits(model, inputs)
    except Words as error:
        return Verdict(name, "not tried", "not tried", layers, f"needs more than token ids: {_line(error)}")
    traced, refused = _traced(model, inputs, stock)
    run, reason = _run(model, inputs, stock, roles)
    return Verdict(name, traced, run, layers, refused or reason)


def _traced(model: Any, inputs: dict[str, Tensor], stock: Tensor) -> tuple[str, str]:
    try:
        with record(model):
            same = _same(_logits(model, inputs), stock)
    except UserError as error:
        return "no", str(error)
    return ("yes", "") if same else ("no", "answers otherwise while it is recorded")


def _run(model: Any, inputs: dict[str, Tensor], stock: Tensor, roles: list[LayerRole]) -> tuple[str, str]:
    try:
        with apply(model, KEEP_ALL):
            same = _same(_logits(model, inputs), stock)
    except UserError as error:
        return "no", str(error)
    if not same:
        return "no", "answers otherwise under a policy that keeps everything"
    governed = sum(role.governed for role in roles)
    return "yes" if governed == len(roles) else f"{governed} of {len(roles)} layers", ""


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """fp32 `[steps, B, V]` of a short greedy answer without image tokens."""
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=list(vision_ids(model)) or None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits).float()


def _same(ours: Tensor, stock: Tensor) -> bool:
    return ours.shape == stock.shape and bool(torch.allclose(ours, stock, atol=TOLERANCE, rtol=TOLERANCE))


def _count(roles: list[LayerRole], role: Role) -> int:
    return sum(one.role is role for one in roles)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 90 else f"{text[:89]}…"
