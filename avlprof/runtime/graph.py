"""Run a function once and then again on the same tensors, without its Python.

A replay runs the operators that the first call ran, on the same inputs, parameters and buffers;
what Python knew at that time is part of it. On CUDA that is a graph. Elsewhere it is a list of
operators, which refuses what a CUDA graph could not hold either: values that Python reads from a
tensor, shapes that depend on them, and tensors that Python makes of numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

_WARM_UP = 2  # calls before a capture, in which CUDA libraries set themselves up
_ASK_THE_HOST = (
    "_local_scalar_dense",
    "equal",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique",
)


Outputs = tuple[Tensor, ...]


class Replay(Protocol):
    """A call that was captured."""

    def __call__(self) -> Outputs:
        """Run it again; what it returned, good until the next time."""


def capture(
    function: Callable[[], Outputs], device: torch.device, undo: Callable[[], None] = lambda: None
) -> tuple[Outputs, Replay]:
    """What `function` returns, and how to run it again.

    It may run more than once; `undo` then takes back what a run has changed, where calling it twice
    is not as good as once.

    Raises:
        RuntimeError: it does what cannot be replayed.
    """
    return _cuda_graph(function, device, undo) if device.type == "cuda" else _recorded(function, undo)


def _cuda_graph(
    function: Callable[[], Outputs], device: torch.device, undo: Callable[[], None]
) -> tuple[Outputs, Replay]:
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            function()
            undo()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay() -> Outputs:
        graph.replay()
        return output

    return replay(), replay


def _recorded(function: Callable[[], Outputs], undo: Callable[[], None]) -> tuple[Outputs, Replay]:
    for _ in range(_WARM_UP):  # as a graph does, so that what cannot run again shows on a CPU too
        function()
        undo()
    with Recording() as recording:
        output = function()
    return output, recording.finished(output)


def opaquely(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that a capture takes as one operator: what it launches cannot be written down.

    It must be pure, and give tensors, the same number of them each time.
    """
    recording = _get_current_dispatch_mode()
    if not isinstance(recording, Recording):
        return function(*args, **kwargs)
    return recording.write(function, args, kwargs)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._inputs: dict[str, Tensor] = {}
        self._functions: dict[str, nn.Module] = {}
        self._alive: list[Any] = []  # kept, so that no identity is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse(func, args)
        called = self._graph.call_function(func, *tree_map_only(Tensor, self._node, (args, kwargs)))
        return self._known(called, func(*args, **kwargs))

    def write(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Write down a call of a function as one operator."""
        name = f"opaque_{len(self._functions)}"
        self._functions[name] = _Opaque(function, args, kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        called = self._graph.call_module(name, tuple(self._node(tensor) for tensor in tensors))
        with _disable_current_modes():
            output = function(*args, **kwargs)
        return self._known(called, output)

    def _known(self, called: fx.Node, output: Any) -> Any:
        """Note what a call returned."""
        self._alive.append(output)
        for index, part in enumerate((output,) if isinstance(output, Tensor) else output):
            if isinstance(part, Tensor) and id(part) not in self._nodes:  # one changed in place is known
                one = part is output
                self._nodes[id(part)] = (
                    called if one else self._graph.call_function(operator.getitem, (called, index))
                )
        return output

    def finished(self, results: Outputs) -> Replay:
        """All that was written down, as a function that returns what `results` were."""
        self._graph.output(tuple(self._node(result) for result in results))
        module: Any = fx.GraphModule({**self._inputs, **self._functions}, self._graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        replay: Replay = module.forward
        return replay

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            name = f"input_{len(self._inputs)}"
            self._inputs[name] = tensor
            self._nodes[id(tensor)] = self._graph.get_attr(name)
            self._alive.append(tensor)
        return self._nodes[id(tensor)]


class _Opaque(nn.Module):
    """A call whose tensors are given anew; a graph holds it as a module, whatever else it was given."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        super().__init__()
        values, self._form = tree_flatten((args, kwargs))
        self._call = function, [None if isinstance(value, Tensor) else (value,) for value in values]

    def forward(self, *tensors: Tensor) -> Any:
        function, fixed = self._call
        given = iter(tensors)
        values = [next(given) if value is None else value[0] for value in fixed]
        args, kwargs = tree_unflatten(values, self._form)
        return function(*args, **kwargs)


def _refuse(func: Any, args: Any) -> None:
    name = str(func).removeprefix("aten.")
    masks = name.startswith("index") and any(
        isinstance(index, Tensor) and index.dtype == torch.bool
        for indices in args
        if isinstance(indices, list | tuple)
        for index in indices
    )
    if masks or any(name.startswith(waits) for waits in _ASK_THE_HOST):
        raise RuntimeError(f"{name} makes Python wait for a value, so it cannot be replayed")
