"""Decoding steps that are captured once and replayed: what is left of a step is its operators.

With stock transformers a small step is bound by Python and by launches, not by what it reads. Here
the first step of each kind, ordinary or refresh, is captured (see `graph`); later ones fill in
token, positions and slots, and replay it. Counts of tokens stay on the host, as in other steps:
layers `advance` before a replay, and their shapes are fixed for some steps ahead.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.session import Session
from avlprof.errors import UserError
from avlprof.policy import Policy
from avlprof.runtime.cache import AVLCache
from avlprof.runtime.graph import Replay, capture
from avlprof.runtime.layer import AdaptiveLayer


@dataclass
class _Captured:
    """What a cache's steps read from the device, and those captured so far, by kind and inputs."""

    slots: Tensor
    position: Tensor
    fresh: bool = True
    inputs: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[Any, tuple[Replay, Any]] = field(default_factory=dict)


class CapturedSteps:
    """The forward call of a model under a policy, with decoding steps captured."""

    def __init__(self, forward: Callable[..., Any], session: Session, ahead: int) -> None:
        self._forward, self._session, self._ahead = forward, session, ahead
        self._busy = threading.Lock()

    def __call__(self, **inputs: Any) -> Any:
        """One forward call; the session has put the cache among the inputs.

        Raises:
            UserError: another thread is at it.
        """
        if not self._busy.acquire(blocking=False):
            raise UserError(
                "captured steps serve one call at a time; leave captured out where threads share a model"
            )
        try:
            return self._call(inputs)
        finally:
            self._busy.release()

    def _call(self, inputs: dict[str, Any]) -> Any:
        cache: AVLCache = inputs[self._session.cache_name]
        if not self._session.stepping:
            cache.captured = None
            return self._forward(**inputs)
        layers: list[AdaptiveLayer] = cache.layers
        ids = inputs.get("input_ids")
        ids = inputs["inputs_embeds"] if ids is None else ids
        inputs = self._with_positions(inputs, ids, layers[0].seen)
        known = self._advance(cache, layers, ids)
        inputs["attention_mask"] = None  # a layer knows what its rows may look at
        for name in [name for name in inputs if name.endswith("token_type_ids")]:
            if inputs[name] is not None and inputs[name].shape[1] > 1:  # of all tokens, for their positions
                del inputs[name]
        more = any(value for name, value in inputs.items() if name.startswith("output_"))
        unlike = more or inputs.get("return_dict") is False  # a replay gives logits and cache alone
        # beams give every step new buffers, so what is fresh has to last for a step before it is captured
        if self._session.observers or unlike or known.fresh:
            known.fresh = False
            return self._forward(**inputs)
        return self._replayed(known, layers, cache, inputs)

    def _with_positions(self, inputs: dict[str, Any], ids: Tensor, seen: int) -> dict[str, Any]:
        """The inputs with positions: the model's own would be those of the step that was captured."""
        if inputs.get("position_ids") is not None:
            return dict(inputs)
        rope = getattr(self._session.model.config.get_text_config(decoder=True), "rope_parameters", None)
        if "mrope_section" in (rope or {}):
            raise UserError(
                "captured steps of a model with multi-axis RoPE need position_ids, as in generate"
            )
        return inputs | {"position_ids": torch.full(ids.shape[:2], seen, device=ids.device)}

    def _advance(self, cache: AVLCache, layers: list[AdaptiveLayer], ids: Tensor) -> _Captured:
        """Count the step in every layer, and tell the device where its token goes."""
        position, device = layers[0].seen, ids.device
        for layer in layers:
            layer.advance()
        known: _Captured | None = cache.captured
        if known is None or not all(layer.fits for layer in layers):
            slots = torch.zeros(len(layers), len(ids), 1, 1, dtype=torch.long, device=device)
            known = cache.captured = _Captured(slots, torch.zeros(1, dtype=torch.long, device=device))
            for layer, own in zip(layers, slots, strict=True):
                layer.fix(self._ahead, own, known.position)
        numbers = torch.tensor([layer.slot_numbers for layer in layers])[..., None, None]
        known.slots.copy_(numbers.pin_memory() if device.type == "cuda" else numbers, non_blocking=True)
        known.position.fill_(position)
        return known

    def _replayed(
        self, known: _Captured, layers: list[AdaptiveLayer], cache: AVLCache, inputs: dict[str, Any]
    ) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        kind = (
            any(layer.step is not None and layer.step.refreshing for layer in layers),
            tuple((name, tuple(value.shape)) for name, value in tensors.items()),
            tuple((name, repr(value)) for name, value in others.items() if value is not cache),
        )
        for name, value in tensors.items():
            fixed = known.inputs.get(name)
            if fixed is None or fixed.shape != value.shape:
                known.inputs[name] = value.clone()
                known.steps.clear()
            else:
                fixed.copy_(value)
        if kind in known.steps:
            replay, output = known.steps[kind]
            logits = replay()
        else:
            changing = [part for layer in layers for part in layer.changing]
            output, logits, replay = self._capture(known, tensors, others, changing)
            known.steps[kind] = replay, output
        return output(logits=logits.clone(), **{self._session.cache_name: cache})

    def _capture(
        self, known: _Captured, tensors: dict[str, Tensor], others: dict[str, Any], changing: list[Tensor]
    ) -> tuple[type, Tensor, Replay]:
        """Capture a step on the fixed inputs: the class of its output, its logits, and its replay.

        A second run would change the tensors of `changing` once more.
        """
        output: Any = None
        before = [part.clone() for part in changing]

        def undo() -> None:
            for part, was in zip(changing, before, strict=True):
                part.copy_(was)

        def step() -> Tensor:
            nonlocal output
            self._session.begin_again()
            output = self._forward(**others, **{name: known.inputs[name] for name in tensors})
            logits: Tensor = output.logits
            return logits

        try:
            logits, replay = capture(step, known.slots.device, undo)
        except RuntimeError as error:
            raise UserError(f"a decoding step of this model cannot be captured: {error}") from error
        return type(output), logits, replay


@contextlib.contextmanager
def captured_steps(model: PreTrainedModel, session: Session, ahead: int) -> Iterator[None]:
    """Capture and replay the decoding steps of a switched model for the length of the context."""
    forward = model.forward
    own = "forward" in vars(model)
    steps = CapturedSteps(forward, session, ahead)

    @functools.wraps(forward)
    def captured(**inputs: Any) -> Any:
        return steps(**inputs)

    model.forward = captured
    session.single = True
    try:
        yield
    finally:
        session.single = False
        if own:
            model.forward = forward
        else:
            del model.forward


def check_capturable(model: PreTrainedModel, policy: Policy, cache: AVLCache, ahead: int) -> None:
    """`UserError` when steps under a policy cannot be captured; `cache` is one of the model's."""
    if ahead < 1:
        raise UserError(
            f"captured must be the number of steps that one capture serves, at least 1, got {ahead}"
        )
    if policy.running is not None:
        raise UserError(
            f"policy '{policy.name}' evicts by score while decoding, which cannot be captured; "
            "leave captured out"
        )
    if any(cache.governed(index) is None for index in range(len(cache.layers))):
        raise UserError("layers with a sliding window or a state cannot be captured; leave captured out")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UserError("a model on several devices cannot be captured; leave captured out")
