"""Norms, rotary embeddings and feed-forward parts of decoder layers, compiled for captured steps.

Behind attention and products a step is bound by small kernels: some 45 a layer in the models' own code.
Each part here is one function of that code, compiled as a whole; the attention call between them, and
with it cache and policy, stays as it is. Parts are in place only while a step is captured: a replay runs
what they launched, and prompts never meet them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import nn

from avlprof.attention.gate import decoder_of
from avlprof.runtime.graph import opaquely

_ROTARY = "apply_rotary_pos_emb"  # a global of modeling files
_SHAPES = 256  # that one function may be compiled for: batches, heads, precisions
_log = logging.getLogger(__name__)

Function = Callable[..., Any]


class FusedParts:
    """The parts of a model's decoder that are compiled, each at its first use, without a graph break.

    What does not compile stays as it is: `refused` has the reasons, by name, and a warning says so once.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        """`backend` of `torch.compile`."""
        self.refused: dict[str, str] = {}
        self._backend = backend
        self._compiled: dict[Function, Function] = {}
        self._parts = list(self._found(decoder_of(model)))

    @property
    def names(self) -> list[str]:
        """Of the parts, without repeats: class and function."""
        return sorted({name for _, name, _ in self._parts})

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model's modules call the compiled parts, for the length of the context."""
        with contextlib.ExitStack() as stack:
            for module, _, forward in self._parts:
                module.forward = forward
                stack.callback(vars(module).pop, "forward")
            yield

    def _found(self, decoder: nn.Module) -> Iterator[tuple[nn.Module, str, Function]]:
        """Each module that takes part, its part's name, and its forward call."""
        layers: Any = decoder.layers
        others = [module for name, module in decoder.named_children() if name == "norm"]
        for layer in layers:
            for child in layer.children():
                if isinstance(getattr(child, "layer_idx", None), int):  # attention: what is around its call
                    others += [part for part in child.children() if not isinstance(part, nn.Linear)]
                    yield from self._with_rotary(child)
                else:
                    others.append(child)
        for module in others:
            forward, name = type(module).forward, type(module).__name__
            if "forward" not in vars(module) and any(True for _ in module.parameters()):
                yield module, name, partial(self._run, name, forward, module)

    def _with_rotary(self, attention: nn.Module) -> Iterator[tuple[nn.Module, str, Function]]:
        """An attention module whose own forward call finds a compiled rotary embedding."""
        forward: Any = type(attention).forward
        stock = inspect.unwrap(forward)
        if _ROTARY not in stock.__code__.co_names or "forward" in vars(attention):
            return
        name = f"{type(attention).__name__}.{_ROTARY}"
        rotary = partial(self._run, name, stock.__globals__[_ROTARY])
        yield attention, name, types.MethodType(with_global(forward, _ROTARY, rotary), attention)

    def _run(self, name: str, stock: Function, *args: Any, **kwargs: Any) -> Any:
        """Call a part, compiled if it can be."""
        if name in self.refused:
            return stock(*args, **kwargs)
        if stock not in self._compiled:
            self._compiled[stock] = self._compile(stock)
        try:
            return opaquely(self._compiled[stock], *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:  # of compiler, or of a launch
            self.refused[name] = str(error).strip().splitlines()[0]
            _log.warning("%s is not fused in captured steps: %s", name, self.refused[name])
            return stock(*args, **kwargs)

    def _compile(self, stock: Function) -> Function:
        """A part that runs compiled, in contexts too, where what is compiled runs eagerly else.

        They do so for the sake of attention, which is in no part.
        """
        compiled = torch.compile(stock, fullgraph=True, dynamic=False, backend=self._backend)
        limits = {"recompile_limit": _SHAPES, "accumulated_recompile_limit": _SHAPES}

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.compiler.set_stance("default"), torch._dynamo.config.patch(limits):
                return compiled(*args, **kwargs)

        return run


def with_global(function: Any, name: str, value: Any) -> Any:
    """A copy of a function, and of those that it wraps, of which the innermost finds `value` as `name`."""
    inner, cells = getattr(function, "__wrapped__", None), function.__closure__
    known = function.__globals__
    if inner is None:
        known = {**known, name: value}
    else:
        own = with_global(inner, name, value)
        cells = tuple(types.CellType(own) if cell.cell_contents is inner else cell for cell in cells)
    copy = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
