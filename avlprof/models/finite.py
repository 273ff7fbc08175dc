"""Numbers that are not finite stop what is at work: they would pass for an answer, or for no attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from avlprof.errors import UserError

REMEDY = "try dtype bfloat16 or float32, or check the weights"


class FiniteLogits(LogitsProcessor):
    """Looks on while tokens are chosen, and notes rows whose best logit is not a finite number.

    Nothing waits for a device before `check`.
    """

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [rows, vocabulary]`, handed back as they are."""
        self._steps.append(scores.amax(dim=-1).isfinite())
        return scores

    def check(self, model: Any, encoding: Mapping[str, Tensor], samples: Sequence[str]) -> None:
        """`UserError` with the first step and row that was not finite, and the layer that it came from."""
        if not self._steps:
            return
        finite = torch.stack(self._steps)
        if bool(finite.all()):
            return
        step, row = (~finite).nonzero()[0].tolist()
        where = f"the logits of {named(samples, row)}"
        layer = first_layer(model, encoding) if step == 0 else None
        if layer is not None:
            where += f", from layer {layer} on,"
        elif step:
            where += f", at token {step + 1} of the answer,"
        raise not_finite(where)


def named(samples: Sequence[str], row: int) -> str:
    """A row of a batch by its sample's id, if ids are known."""
    return f"sample '{samples[row]}'" if row < len(samples) else f"row {row} of the batch"


def not_finite(what: str) -> UserError:
    """The sentence about numbers that are not finite; `what` is plural."""
    return UserError(f"{what} are not finite; {REMEDY}")


@torch.inference_mode()
def first_layer(model: Any, encoding: Mapping[str, Tensor]) -> int | None:
    """The first decoder layer whose output holds a number that is not finite, found by another forward.

    None where there is none, or the model could not be run again.
    """
    layers = list(getattr(model.get_decoder(), "layers", ()))
    broken: list[int] = []
    with _looking(layers, broken), contextlib.suppress(Exception):
        model(**encoding)
    return min(broken, default=None)


@contextlib.contextmanager
def _looking(layers: Sequence[nn.Module], broken: list[int]) -> Iterator[None]:
    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and not bool(hidden.isfinite().all()):
                broken.append(index)

        return hook

    hooks = [layer.register_forward_hook(note(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
