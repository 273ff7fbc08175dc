"""The attention function of a model, overheard under its own name, uncompiled, and how it takes masks.

A private name would not be neutral: some models ask which implementation is set and compute
something else under one that they do not know. So the functions registered as `sdpa`, `eager`,
`flash_attention_2`, ... are wrapped for the length of a context, in the registry that modeling
files ask. A call of a module that nobody listens to goes straight through.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from avlprof.attention.call import AttentionCall, Kernel
from avlprof.attention.masks import plain_mask
from avlprof.errors import UserError

EAGER = "eager"
Listener = Callable[[AttentionCall], Tensor]

_lock = threading.Lock()
_listeners: dict[nn.Module, tuple[int, Listener]] = {}
_wrapped: dict[str, tuple[int, Kernel | None]] = {}


@contextlib.contextmanager
def overheard(modules: dict[nn.Module, int], name: str, listener: Listener) -> Iterator[None]:
    """Hand the attention calls of some modules to `listener`, for the length of the context.

    Args:
        modules: the attention modules, and the number of the layer of each.
        name: the implementation that they are set to.
        listener: gives the output `[B, q, H, D]` of a call.
    """
    with _lock:
        _wrap(name)
        _listeners.update((module, (layer, listener)) for module, layer in modules.items())
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _listeners.pop(module, None)
            _unwrap(name)


def _wrap(name: str) -> None:
    count, stock = _wrapped.get(name, (0, None))
    if count == 0:
        # eager functions live in the modeling files, and are asked for as the default
        stock = AttentionInterface._global_mapping.get(name)
        AttentionInterface.register(name, _wrapper(name, stock))
    _wrapped[name] = (count + 1, stock)


def _unwrap(name: str) -> None:
    count, stock = _wrapped.pop(name)
    if count > 1:
        _wrapped[name] = (count - 1, stock)
        return
    if stock is None:
        AttentionInterface._global_mapping.pop(name, None)
    else:
        AttentionInterface.register(name, stock)


def _wrapper(name: str, stock: Kernel | None) -> Kernel:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        own = stock or _eager_function(module)
        known = _listeners.get(module)
        if known is None:
            if scaling is not None:
                options["scaling"] = scaling
            return own(module, query, key, value, attention_mask, **options)
        layer, listener = known
        mask = plain_mask(attention_mask, query, key, options)
        call = AttentionCall(
            layer=layer,
            module=module,
            query=query,
            key=key,
            value=value,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=options.get("softcap"),
            kernel=_with_masks(own, name, attention_mask, mask),
            options=options,
        )
        return listener(call), None

    return attend


def _eager_function(module: nn.Module) -> Kernel:
    eager: Kernel | None = getattr(
        sys.modules[type(module).forward.__module__], "eager_attention_forward", None
    )
    if eager is None:
        raise UserError(f"{type(module).__name__} has no eager attention function; load the model with sdpa")
    return eager


def _with_masks(stock: Kernel, name: str, original: Any, plain: Tensor | None) -> Kernel:
    """`stock`, which takes booleans as well: the mask that came with the call in its own form."""

    def run(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if mask is plain:
            if name == EAGER:
                options.setdefault("dropout", 0.0)
            return stock(module, query, key, value, original, **options)
        if name == EAGER and mask is not None:
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
            options.setdefault("dropout", 0.0)
            return stock(module, query, key, value, mask, **options)
        if name in ("sdpa", EAGER):
            return stock(module, query, key, value, mask, **options)
        sdpa: Kernel = AttentionInterface._global_mapping[
            "sdpa"
        ]  # flash and flex take no mask of single pairs
        return sdpa(module, query, key, value, mask, **options)

    return run


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled calls run uncompiled inside, if anything is compiled in this process.

    What was traced by the compiler does not ask for the attention function any more.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
