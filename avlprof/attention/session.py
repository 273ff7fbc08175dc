"""A switched model: its attention handed to observers and a runtime, for the length of a context."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from avlprof.attention.call import AttentionCall, AttentionRuntime, Forward, Kernel, Observer
from avlprof.attention.kernels import explicit_mask, stock_kernel
from avlprof.attention.modality import Modality, modality_map, turn_map, vision_token_ids
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
    """The cache in a model's output."""
    return next((output[name] for name in NAMES if name in output), None)


_AHEAD = 64  # positions of generated tokens that are marked ahead


class Passed:
    """The modality of every position that a cache has seen, and its decoding passes."""

    def __init__(self, modality: Tensor) -> None:
        self._marked, self.length, self.steps = modality, modality.shape[1], 0

    @property
    def modality(self) -> Tensor:
        """`[B, n]`."""
        return self._marked.narrow(1, 0, self.length)

    def step(self) -> None:
        """One more generated token a row."""
        self.steps += 1
        self.length += 1
        if self.length > self._marked.shape[1]:
            self._marked = pad(self._marked, (0, _AHEAD), value=int(Modality.GENERATED))

    def turn(self, modality: Tensor) -> None:
        """A turn with tokens `[B, m]`."""
        self.steps += 1
        self._marked = torch.cat([self.modality, modality], dim=1)
        self.length = self._marked.shape[1]


IMPLEMENTATIONS = {"sdpa": "avlprof", "eager": "avlprof_eager"}  # one for each form that masks take
_SESSION = "_avlprof_session"


@dataclass
class Session:
    """A switched model; made by `switched`."""

    model: PreTrainedModel
    kernel: Kernel
    signature: inspect.Signature
    cache_name: str
    observers: list[Observer] = field(default_factory=list)
    runtime: AttentionRuntime | None = None
    _states: WeakKeyDictionary[Any, Passed] = field(default_factory=WeakKeyDictionary)
    _forward: Forward | None = None
    _cache: Any = None

    @property
    def stepping(self) -> bool:
        """Whether the pass at work is a decoding step."""
        return self._forward is not None and self._forward.step > 0 and self._forward.new == 1

    def adopt(self, cache: Any, modality: Tensor) -> None:
        """Vouch for a cache that was not filled in this context: its positions' modalities `[B, n]`."""
        self._states[cache] = Passed(modality)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the model: swap the cache in and work out the modalities."""
        values = dict(kwargs)
        if args:
            values = self.signature.bind_partial(*args, **kwargs).arguments
            values |= values.pop("kwargs", {})
        passed = [values.pop(name) for name in NAMES if name in values]
        caches = [cache for cache in passed if cache is not None]
        if len(caches) > 1:
            raise UserError(
                f"the cache was given twice, as {' and '.join(NAMES)}; give {self.cache_name} alone"
            )
        cache = caches[0] if caches else None
        past = cache.get_seq_length() if cache is not None else 0
        ids = values.get("input_ids")
        if self.runtime is not None:
            cache = self._swapped(cache, past, values)
        if cache is not None or passed:
            values[self.cache_name] = cache
        if past == 0:
            if ids is None:
                raise UserError(
                    "the prompt's input_ids are needed to tell vision tokens from text; pass input_ids"
                )
            vision = vision_token_ids(self.model.config)
            state = Passed(modality_map(ids, values.get("attention_mask"), vision))
        else:
            known = self._states.get(cache)
            if known is None or known.length != past:
                raise UserError(
                    "the cache was filled outside of this context, so its modalities are unknown; "
                    "run the prompt inside the context"
                )
            state = known
            self._go_on(state, values)
        if cache is not None:
            self._states[cache] = state
        self._cache = cache
        self._forward = Forward(state.modality, state.length - past, state.steps)
        for observer in self.observers:
            observer.begin(self._forward)
        return (), values

    def _go_on(self, state: Passed, values: dict[str, Any]) -> None:
        """Note this pass's tokens behind the prompt: one is generated, more are a turn."""
        ids = values.get("input_ids")
        if (ids if ids is not None else values["inputs_embeds"]).shape[1] == 1:
            state.step()
            return
        if ids is None:
            raise UserError("the input_ids of a turn are needed to tell vision from text; pass input_ids")
        vision = vision_token_ids(self.model.config)
        state.turn(turn_map(ids, values.get("attention_mask"), vision, state.modality))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the model: let go of the pass, also after an exception."""
        self._forward = self._cache = None

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
            cache = runtime.new_cache()
        values["use_cache"] = True
        return cache

    def attend(self, call: AttentionCall) -> Tensor:
        """The output of one layer's attention; observers see the call afterwards."""
        if self._forward is None:
            raise UserError("call the model that was switched, not a part of it")
        if self.runtime is None:
            out = call.stock()
        else:
            out, call = self.runtime.attend(self._forward, self._cache, call)
        if self.observers and call.query.shape[2] < self._forward.new:
            raise UserError(
                "behind a prefill_filter layers see fewer tokens than the prompt has, which cannot be "
                "recorded; record under a policy without one"
            )
        for observer in self.observers:
            observer.attended(self._forward, call)
        if call.after is not None:
            call.after()
        return out


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The registered function: finds the session of the module and hands it the call."""
    session: Session = getattr(module, _SESSION)
    call = AttentionCall(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        module=module,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=options.get("softcap"),
        kernel=session.kernel,
        options=options,
    )
    return session.attend(call), None


@contextlib.contextmanager
def switched(
    model: PreTrainedModel, observers: tuple[Observer, ...] = (), runtime: AttentionRuntime | None = None
) -> Iterator[Session]:
    """Switch the language model's attention to avlprof's for the length of the context.

    Contexts nest on one model: an inner one adds observers or the runtime to the outer
    session. Everything is restored on exit, exceptions and Ctrl-C included.

    Raises:
        UserError: the model's attention cannot be switched, or it has a runtime already.
    """
    decoder = _decoder(model)
    outer: Session | None = getattr(decoder, _SESSION, None)
    with contextlib.ExitStack() as undo:
        session = outer or undo.enter_context(_installed(model, decoder))
        if runtime is not None:
            if session.runtime is not None:
                raise UserError("the model already runs under a policy; leave that context first")
            session.runtime = runtime
            undo.callback(setattr, session, "runtime", None)
        session.observers.extend(observers)
        try:
            yield session
        finally:
            for observer in observers:
                session.observers.remove(observer)


@contextlib.contextmanager
def _installed(model: PreTrainedModel, decoder: Any) -> Iterator[Session]:
    text_config: Any = decoder.config
    before: str = text_config._attn_implementation
    signature = inspect.signature(model.forward)
    session = Session(model, stock_kernel(decoder, before), signature, cache_argument(model))
    modules = [m for m in decoder.modules() if hasattr(m, "layer_idx")]
    for name, mask in zip(IMPLEMENTATIONS.values(), (sdpa_mask, explicit_mask), strict=True):
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, mask)
    hooks = [
        model.register_forward_pre_hook(session.before, with_kwargs=True),
        model.register_forward_hook(session.after, with_kwargs=True, always_call=True),
    ]
    try:
        for module in (decoder, *modules):
            setattr(module, _SESSION, session)
        _set_implementation(model, text_config, IMPLEMENTATIONS[before or "eager"])
        yield session
    finally:
        for hook in hooks:
            hook.remove()
        for module in (decoder, *modules):
            if hasattr(module, _SESSION):
                delattr(module, _SESSION)
        if text_config._attn_implementation != before:
            _set_implementation(model, text_config, before)


def _decoder(model: PreTrainedModel) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not hasattr(decoder, "layers") or not hasattr(decoder, "config"):
        raise UserError(
            f"{type(model).__name__} has no decoder with layers, so its attention cannot be switched"
        )
    return decoder


def _set_implementation(model: PreTrainedModel, text_config: Any, name: str) -> None:
    """Switch the language model alone; vision towers keep their attention."""
    keys = [
        key
        for key in getattr(model.config, "sub_configs", {})
        if getattr(model.config, key, None) is text_config
    ]
    try:
        model.set_attn_implementation({keys[0]: name} if keys else name)
    except (ValueError, ImportError) as error:
        raise UserError(f"the attention of {type(model).__name__} cannot be switched: {error}") from None
    if text_config._attn_implementation != name:
        raise UserError(
            f"the attention of {type(model).__name__} cannot be switched; it does not use transformers' "
            "attention interface"
        )
