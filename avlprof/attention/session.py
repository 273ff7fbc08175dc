"""A switched model: its attention handed to observers and a runtime, for the length of a context."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from avlprof.attention.call import AttentionCall, AttentionRuntime, AtWork, Forward, Observer
from avlprof.attention.gate import Role, check_call, check_traced, decoder_of, layer_roles
from avlprof.attention.kernels import EAGER, eagerly, overheard
from avlprof.attention.masks import as_long_as, check_built, odd_mask, padding_mask
from avlprof.attention.modality import modality_map, turn_map, vision_token_ids
from avlprof.attention.passed import (
    LeftKeys,
    Passed,
    appends,
    check_known,
    check_replaceable,
    check_tried,
)
from avlprof.errors import UserError

NAMES = ("cache", "past_key_values")  # of a cache, argument and output: from transformers 5.24 on, and before


def cache_argument(model: nn.Module) -> str:
    """The name of the cache among the arguments of a model's forward call."""
    new, old = NAMES
    return new if new in inspect.signature(model.forward).parameters else old


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword arguments that hand a cache to a model: `model(**inputs, **with_cache(model, cache))`."""
    return {cache_argument(model): cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache in a model's output, also in a tuple; None where it has none."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return next((output[name] for name in NAMES if name in output), None)


@dataclass
class _Pass:
    """A forward pass at work; `layers` are those that have attended."""

    forward: Forward
    cache: Any
    passed: Passed
    layers: set[int] = field(default_factory=set)
    unheard: list[AttentionCall] | None = None  # calls that observers are told of later
    doubt: Callable[[AttentionCall], None] | None = None  # what a layer of all tokens has to pass


class _Thread(threading.local):
    """What belongs to a call of the model, not to the model: threads may call one at once."""

    now: _Pass | None = None
    uncached: Tensor | None = None


class Session(AtWork):
    """A switched model; made by `switched`."""

    def __init__(self, model: PreTrainedModel, implementation: str) -> None:
        self.model = model
        self.implementation = implementation
        self.roles = layer_roles(model.config.get_text_config(decoder=True))
        self.signature = inspect.signature(model.forward)
        self.cache_name = cache_argument(model)
        self.observers: list[Observer] = []
        self.runtime: AttentionRuntime | None = None
        self.single = False  # what stands for its forward serves one call at a time, and no copy
        self.contexts = contextlib.ExitStack()
        self.users = 0
        self._states: WeakKeyDictionary[Any, Passed] = WeakKeyDictionary()
        self._left = LeftKeys()
        self._thread = _Thread()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A copy of the model is a stock model: its hooks find that it is another one."""
        if self.single:
            raise UserError("a model with captured steps cannot be copied; copy it before the context")
        return self

    @property
    def stepping(self) -> bool:
        """Whether the pass at work is a decoding step."""
        now = self._thread.now
        return now is not None and now.forward.step > 0 and now.forward.new == 1

    def begin_again(self) -> list[AttentionCall]:
        """The pass at work runs once more, as before a capture; its calls, for `tell`, are not heard yet."""
        now = self._thread.now
        assert now is not None
        now.layers.clear()
        now.unheard = []
        return now.unheard

    def tell(self, calls: list[AttentionCall]) -> None:
        """Let observers hear calls of the pass at work."""
        now = self._thread.now
        assert now is not None
        for call in calls:
            self._heard(now, call)

    def _heard(self, now: _Pass, call: AttentionCall) -> None:
        if self.observers and call.query.shape[2] < now.forward.new:
            raise UserError(
                f"layer {call.layer} attends for {call.query.shape[2]} of the {now.forward.new} tokens of "
                "the prompt, which cannot be recorded (a prefill_filter drops tokens; layers that read "
                "another layer's keys may look with the last one alone)"
            )
        seen = call.decoded(call) if self.observers and call.decoded is not None else call
        for observer in self.observers:
            observer.attended(now.forward, seen)

    def adopt(self, cache: Any, modality: Tensor) -> None:
        """Vouch for a cache that was not filled in this context: its positions' modalities `[B, n]`."""
        self._states[cache] = Passed(modality)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Forward pre-hook of the model: swap the cache in and work out the modalities."""
        if module is not self.model:
            return None
        values = dict(kwargs)
        if args:
            values = self.signature.bind_partial(*args, **kwargs).arguments
            values |= values.pop("kwargs", {})
        named = [values.pop(name) for name in NAMES if name in values]
        caches = [one for one in named if one is not None]
        if len(caches) > 1:
            raise UserError(
                f"the cache was given twice, as {' and '.join(NAMES)}; give {self.cache_name} alone"
            )
        cache = caches[0] if caches else None
        past = int(cache.get_seq_length()) if cache is not None else 0
        padding = padding_mask(values, past)
        self._check_asked(values, past, cache is not None)
        doubt = None
        if self.runtime is not None:
            odd = odd_mask(values.get("attention_mask"), padding, past)
            if odd is not None and padding is not None:
                doubt = partial(check_built, odd, padding, past)
            cache = self._swapped(cache, past, values)
            if "attention_mask" in values and padding is not values["attention_mask"]:
                values["attention_mask"] = padding  # made for the cache that was swapped out
        if cache is not None or named:
            values[self.cache_name] = cache
        state = self._prompt(values, padding) if past == 0 else self._known(cache, past, values, padding)
        if cache is not None:
            self._states[cache] = state
        self._enter(cache, True)
        moved = past > 0 and bool(self.observers) and self._left.moved(cache)
        forward = Forward(state.modality, state.length - past, state.steps, state, moved=moved)
        self._thread.now = _Pass(forward, cache, state, doubt=doubt)
        for observer in self.observers:
            observer.begin(self._thread.now.forward)
        return (), values

    def _check_asked(self, values: dict[str, Any], past: int, given: bool) -> None:
        """Refuse what cannot be served, by its true cause; `given`: the caller brought a cache."""
        config: Any = decoder_of(self.model).config
        if (config._attn_implementation or EAGER) != self.implementation:
            raise UserError(
                f"the model's attention was set to '{config._attn_implementation}' inside the context, where "
                f"'{self.implementation}' is followed; set it before entering"
            )
        if values.get("output_attentions"):
            raise UserError(
                "attention weights are what avlprof.record measures, without forming them; leave "
                "output_attentions out"
            )
        tokens = values.get("input_ids")
        check_tried(values.get("logits_to_keep"), 0 if tokens is None else tokens.shape[1], past, given)

    def _prompt(self, values: dict[str, Any], padding: Tensor | None) -> Passed:
        """A prompt's modalities."""
        ids = values.get("input_ids")
        if ids is None:
            raise UserError(
                "the prompt's input_ids are needed to tell vision tokens from text; pass input_ids"
            )
        before = self._thread.uncached
        self._thread.uncached = ids if values.get("use_cache") is False else None
        if before is not None and torch.equal(ids[:, :-1], before):
            raise UserError(
                "the model answers without a KV cache, so each of its steps looks like a new prompt; "
                "call it with use_cache=True"
            )
        return Passed(modality_map(ids, padding, vision_token_ids(self.model.config)))

    def _known(self, cache: Any, past: int, values: dict[str, Any], padding: Tensor | None) -> Passed:
        """What has passed of a conversation, this pass included: one token is generated, more are a turn."""
        state = check_known(self._states.get(cache), past)
        ids = values.get("input_ids")
        if (ids if ids is not None else values["inputs_embeds"]).shape[1] == 1:
            state.step()
            return state
        if ids is None:
            raise UserError("the input_ids of a turn are needed to tell vision from text; pass input_ids")
        vision = vision_token_ids(self.model.config)
        state.turn(turn_map(ids, padding, vision, state.modality))
        return state

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the model: let go of the pass, also after an exception."""
        now = self._thread.now
        if module is not self.model or now is None:
            return
        self._enter(now.cache, False)
        self._thread.now = None
        cache = now.cache
        if cache is None and output is not None and (cache := cache_of(output)) is not None:
            self._states[cache] = now.passed  # a cache of the model's own making: a loop may go on with it
        if self.observers and cache is not None:
            self._left.note(cache)
        if output is not None and not now.layers and not self.single:
            raise UserError(
                f"the layers of {type(self.model).__name__} do not ask transformers' attention interface, so "
                "their attention cannot be followed"
            )

    def _enter(self, cache: Any, active: bool) -> None:
        """Tell a policy's cache that a pass of its context is at work, or over."""
        if self.runtime is not None and hasattr(cache, "active"):
            cache.active = active

    def _swapped(self, cache: Any, past: int, values: dict[str, Any]) -> Any:
        runtime = self.runtime
        assert runtime is not None
        if values.get("use_cache") is False:
            raise UserError("a policy acts on the KV cache; call the model with use_cache=True")
        if cache is None or not runtime.owns(cache):
            if past > 0:
                raise UserError(
                    "the cache was filled outside of this context; run the prompt inside the context"
                )
            check_replaceable(cache)
            cache = runtime.new_cache()
        values["use_cache"] = True
        return cache

    def attend(self, call: AttentionCall) -> Tensor:
        """The output of one layer's attention; observers see the call afterwards."""
        now = self._thread.now
        if now is None:
            raise UserError(
                "call the model that was switched, not a part of it; compile it before the context"
            )
        runtime = self.runtime
        governed = runtime is not None and runtime.governs(now.cache, call.layer)
        measured = governed or bool(self.observers)
        full = self.roles[call.layer].role is Role.FULL
        check_call(call, now.layers, measured, full, self.implementation)
        now.layers.add(call.layer)
        if now.doubt is not None and full:
            now.doubt(call)
            now.doubt = None
        if not governed:  # a policy's view of a ragged batch may be longer than what has been seen
            call = as_long_as(call, now.forward.modality.shape[1])
            call = call._replace(appended=appends(now.cache, call.layer))
        if runtime is None:
            out = call.stock()
        else:
            out, call = runtime.attend(now.forward, now.cache, call)
        if now.unheard is None:
            self._heard(now, call)
        else:
            now.unheard.append(call._replace(after=None))
        if call.after is not None:
            call.after()
        return out


@contextlib.contextmanager
def switched(
    model: PreTrainedModel, observers: tuple[Observer, ...] = (), runtime: AttentionRuntime | None = None
) -> Iterator[Session]:
    """Hear a language model's attention for the length of the context, and let a runtime take it over.

    Contexts nest on one model: an inner one adds observers or the runtime to the outer
    session. They may be left in any order; the last one restores the model, exceptions and Ctrl-C
    included. Copies of the model that are made inside are stock models.

    Raises:
        UserError: the model's attention cannot be followed, or it has a runtime already.
    """
    session = session_of(model) or _installed(model)
    if runtime is not None and session.runtime is not None:
        raise UserError("the model already runs under a policy; leave that context first")
    session.users += 1
    if runtime is not None:
        session.runtime = runtime
    session.observers.extend(observers)
    try:
        yield session
    finally:
        for observer in observers:
            session.observers.remove(observer)
        if runtime is not None:
            session.runtime = None
        session.users -= 1
        if session.users == 0:
            session.contexts.close()


def session_of(model: PreTrainedModel) -> Session | None:
    """The session that is at work on a model."""
    hooks = getattr(model, "_forward_pre_hooks", {}).values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((one for one in owners if isinstance(one, Session) and one.model is model), None)


def _installed(model: PreTrainedModel) -> Session:
    check_traced(model)
    decoder = decoder_of(model)
    name: str = decoder.config._attn_implementation or EAGER
    session = Session(model, name)
    modules = {
        module: module.layer_idx
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(overheard(modules, name, lambda call: session.attend(call)))
        for hook in (
            model.register_forward_pre_hook(session.before, with_kwargs=True),
            model.register_forward_hook(session.after, with_kwargs=True, always_call=True),
        ):
            stack.callback(hook.remove)
        session.contexts = stack.pop_all()
    return session
