"""Decoding steps that are captured once and replayed: what is left of a step is its operators.

With stock transformers a small step is bound by Python and by launches, not by what it reads. Here
the first step of each kind, ordinary or refresh, is captured (see `graph`); later ones, of later prompts
too (see `buckets`), fill in token, positions and slots, and replay it. Counts of tokens stay on the
host, as in other steps: layers `advance` before a replay, and their shapes are fixed for some steps ahead.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall
from avlprof.attention.session import Session
from avlprof.errors import UserError, shortened
from avlprof.models.generation import first_position
from avlprof.policy import Policy
from avlprof.runtime.buckets import Bucket, Buckets, CapturedStep
from avlprof.runtime.cache import AVLCache
from avlprof.runtime.graph import Outputs, capture
from avlprof.runtime.layer import AdaptiveLayer

if TYPE_CHECKING:
    from avlprof.runtime.fused import FusedParts


MOST_STEPS = 1 << 16
"""No capture serves more steps: each has a slot in the buffers of every layer."""


class CapturedSteps:
    """The forward call of a model under a policy, with decoding steps captured."""

    def __init__(
        self, forward: Callable[..., Any], session: Session, buckets: Buckets, fused: FusedParts | None
    ) -> None:
        self._forward, self._session, self._buckets, self._fused = forward, session, buckets, fused
        self._busy = threading.Lock()
        self._first: int | None = None

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
        if not self._session.stepping or not all(isinstance(layer, AdaptiveLayer) for layer in cache.layers):
            return self._forward(**inputs)
        cache.counted = True
        try:
            with torch.no_grad():  # a replay has no gradients, and what outlives a call no history
                return self._step(cache, inputs)
        finally:
            cache.counted = False

    def _step(self, cache: AVLCache, inputs: dict[str, Any]) -> Any:
        layers: list[AdaptiveLayer] = cache.layers
        ids = inputs.get("input_ids")
        ids = inputs["inputs_embeds"] if ids is None else ids
        position = layers[0].seen
        inputs = self._with_positions(inputs, ids, position)
        for layer in layers:
            layer.advance()
        bucket = self._buckets.settle(cache)
        bucket.tell([layer.slot_numbers for layer in layers], position)
        inputs["attention_mask"] = None  # a layer knows what its rows may look at
        for name in [name for name in inputs if name.endswith("token_type_ids")]:
            if inputs[name] is not None and inputs[name].shape[1] > 1:  # of all tokens, for their positions
                del inputs[name]
        more = any(value for name, value in inputs.items() if name.startswith("output_"))
        unlike = more or inputs.get("return_dict") is False  # a replay gives logits and cache alone
        # observers of a replay look behind it, when what left the core is no longer what was attended to
        unlike = unlike or bool(self._session.observers and any(layer.changing for layer in layers))
        if unlike:
            return self._forward(**inputs)
        return self._replayed(bucket, cache, inputs)

    def _with_positions(self, inputs: dict[str, Any], ids: Tensor, seen: int) -> dict[str, Any]:
        """The inputs with positions: the model's own would be those of the step that was captured."""
        if inputs.get("position_ids") is not None:
            return dict(inputs)
        rope = getattr(self._session.model.config.get_text_config(decoder=True), "rope_parameters", None)
        if "mrope_section" in (rope or {}):
            raise UserError(
                "captured steps of a model with multi-axis RoPE need position_ids, as in generate"
            )
        if self._first is None:
            self._first = first_position(self._session.model)
        return inputs | {"position_ids": torch.full(ids.shape[:2], seen + self._first, device=ids.device)}

    def _replayed(self, bucket: Bucket, cache: AVLCache, inputs: dict[str, Any]) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        kind = (
            any(layer.step is not None and layer.step.refreshing for layer in cache.layers),
            tuple((name, value.shape, value.dtype) for name, value in tensors.items()),
            tuple((name, repr(value)) for name, value in others.items() if value is not cache),
            self._state(bucket.slots.device.type),
        )
        tensors = {name: bucket.fixed(name, value) for name, value in tensors.items()}
        if kind in bucket.steps:
            captured = bucket.steps[kind]
            logits, *queries = captured.replay()
        else:
            changing = [part for layer in cache.layers for part in layer.changing]
            captured, (logits, *queries) = self._capture(bucket, tensors, others, changing)
            bucket.keep(kind, captured)
        # since a layer attended, slots of its view may have changed places, each with its position
        self._session.tell(captured.heard(queries))
        return captured.output(logits=logits.clone(), **{self._session.cache_name: cache})

    def _state(self, device: str) -> tuple[Any, ...]:
        """What decides a step's operators and is no input of it."""
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self._session.model.training, autocast, bool(self._session.observers)

    def _capture(
        self, bucket: Bucket, tensors: dict[str, Tensor], others: dict[str, Any], changing: list[Tensor]
    ) -> tuple[CapturedStep, Outputs]:
        """Capture a step on fixed inputs, and what it returned this time.

        A second run would change the tensors of `changing` once more.
        """
        output: Any = None
        before = [part.clone() for part in changing]
        calls: list[AttentionCall] = []

        def step() -> Outputs:
            nonlocal output, calls
            calls = self._session.begin_again()
            output = self._forward(**others, **tensors)
            if not self._session.observers:
                calls = []
            return output.logits, *(call.query for call in calls)

        def undo() -> None:
            for part, was in zip(changing, before, strict=True):
                part.copy_(was)

        fused = contextlib.nullcontext() if self._fused is None else self._fused.in_place()
        try:
            with fused:
                outputs, replay = capture(step, bucket.slots.device, undo)
        except RuntimeError as error:
            raise UserError(f"a decoding step of this model cannot be captured: {error}") from error
        self._buckets.captures += 1
        return CapturedStep(replay, type(output), calls), outputs


@contextlib.contextmanager
def forward_as(model: nn.Module, session: Session, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of a switched model's own, inside its hooks, for the length of the context."""
    before, own = model.forward, "forward" in vars(model)

    @functools.wraps(before)
    def replaced(**inputs: Any) -> Any:
        return forward(**inputs)

    model.forward = replaced
    session.single = True
    try:
        yield
    finally:
        session.single = False
        if own:
            model.forward = before
        else:
            del model.forward


@contextlib.contextmanager
def captured_steps(
    model: PreTrainedModel, session: Session, buckets: Buckets, fused: FusedParts | None = None
) -> Iterator[None]:
    """Capture and replay the decoding steps of a switched model for the length of the context.

    `fused` are parts of the model to compile in them.
    """
    with forward_as(model, session, CapturedSteps(model.forward, session, buckets, fused)):
        yield


def check_counts(captured: Any, kept_bytes: Any, fused: Any = None) -> None:
    """Refuse arguments of `apply` that say nothing.

    Raises:
        UserError: `captured` is neither None nor a number of steps, `kept_bytes` no number of bytes, or
            `fused` neither a choice nor a backend.
    """
    for name, value, what, least, most in (
        ("captured", captured, "the number of steps that one capture serves", 1, MOST_STEPS),
        ("kept_bytes", kept_bytes, "a whole number of bytes", 0, None),
    ):
        if name == "captured" and value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and value >= least and (most is None or value <= most):
            continue
        limit = f"at least {least}" + ("" if most is None else f" and at most {most:,}")
        raise UserError(f"{name} must be {what}, {limit}, got {value!r}")
    named = isinstance(fused, str) and fused in torch.compiler.list_backends(exclude_tags=())
    if not (fused is None or isinstance(fused, bool) or named):
        raise UserError(
            "fused must be None, True, False or the name of a backend of torch.compile, such as 'inductor', "
            f"got {shortened(fused)}"
        )


def check_capturable(model: PreTrainedModel, policy: Policy, cache: AVLCache) -> None:
    """`UserError` when steps under a policy cannot be captured; `cache` is one of the model's."""
    if policy.running is not None:
        raise UserError(
            f"policy '{policy.name}' evicts by score while decoding, which cannot be captured; "
            "leave captured out"
        )
    if policy.scores_core:
        raise UserError(
            f"policy '{policy.name}' scores its core at every step (core_score), which cannot be captured; "
            "leave captured out"
        )
    if policy.triggered:
        raise UserError(
            f"policy '{policy.name}' refreshes when its steps say so (refresh: triggered), which cannot be "
            "captured; leave captured out"
        )
    if policy.heads == "adaptive":
        raise UserError(
            f"policy '{policy.name}' keeps as many tokens in each head as the prompt says (heads: "
            "adaptive), which cannot be captured; leave captured out"
        )
    if any(cache.governed(index) is None for index in range(len(cache.layers))):
        raise UserError("layers with a sliding window or a state cannot be captured; leave captured out")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UserError("a model on several devices cannot be captured; leave captured out")
