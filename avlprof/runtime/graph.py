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
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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


class Replay(Protocol):
    """A call that was captured."""

    def __call__(self) -> Tensor:
        """Run it again; what it returned, good until the next time."""


def capture(
    function: Callable[[], Tensor], device: torch.device, undo: Callable[[], None] = lambda: None
) -> tuple[Tensor, Replay]:
    """What `function` returns, and how to run it again.

    It may run more than once; `undo` then takes back what a run has changed, where calling it twice
    is not as good as once.

    Raises:
        RuntimeError: it does what cannot be replayed.
    """
    return _cuda_graph(function, device, undo) if device.type == "cuda" else _recorded(function, undo)


def _cuda_graph(
    function: Callable[[], Tensor], device: torch.device, undo: Callable[[], None]
) -> tuple[Tensor, Replay]:
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

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay(), replay


def _recorded(function: Callable[[], Tensor], undo: Callable[[], None]) -> tuple[Tensor, Replay]:
    for _ in range(_WARM_UP):  # as a graph does, so that what cannot run again shows on a CPU too
        function()
        undo()
    with Recording() as recording:
        output = function()
    return output, recording.finished(output)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._inputs: dict[str, Tensor] = {}
        self._alive: list[Any] = []  # kept, so that no identity is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse(func, args)
        called = self._graph.call_function(func, *tree_map_only(Tensor, self._node, (args, kwargs)))
        output = func(*args, **kwargs)
        self._alive.append(output)
        for index, part in enumerate((output,) if isinstance(output, Tensor) else output):
            if isinstance(part, Tensor) and id(part) not in self._nodes:  # one changed in place is known
                one = part is output
                self._nodes[id(part)] = (
                    called if one else self._graph.call_function(operator.getitem, (called, index))
                )
        return output

    def finished(self, result: Tensor) -> Replay:
        """All that was written down, as a function that returns what `result` was."""
        self._graph.output(self._node(result))
        self._graph.eliminate_dead_code()
        module: Any = fx.GraphModule(self._inputs, self._graph)
        replay: Replay = module.forward
        return replay

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            name = f"input_{len(self._inputs)}"
            self._inputs[name] = tensor
            self._nodes[id(tensor)] = self._graph.get_attr(name)
            self._alive.append(tensor)
        return self._nodes[id(tensor)]


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
