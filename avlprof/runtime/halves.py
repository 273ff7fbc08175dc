"""A decoder layer cut in two at its attention call: what its code does before it, and behind it.

Each half is a function of tensors alone, so that it can be compiled as a whole, whatever cache, policy or
recorder stands behind the attention call between them. The cut is found by running the layer's own code once
on stand-ins that write down what happens to them, as `torch.fx` does, but on a shell of the layer: nothing
of torch is patched, and other threads see nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

_FIXED = (bool, int, float, str, type(None))  # arguments that a layer's code may ask about
_ATTENDED = "attended"  # the name of what attention returns
_PLACE = "positional_"  # names of arguments that come without one

Function = Callable[..., Any]
Arguments = dict[str, Any]


def numbered(args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """The arguments of a call by name, those without a name by their number."""
    return {f"{_PLACE}{index}": value for index, value in enumerate(args)} | kwargs


def form(arguments: Arguments) -> tuple[Any, ...]:
    """What the cut of a layer depends on, of the arguments that it is called with."""
    return tuple(
        (name, value if isinstance(value, _FIXED) else type(value)) for name, value in arguments.items()
    )


@dataclass(frozen=True)
class Halves:
    """The two halves of a decoder layer; layers of a kind have the same functions.

    `before(layer, *takes)` gives the values `gives`, and `after(layer, *needs)` what the layer returns, where
    `takes` and `needs` are names of its arguments, of values given, and of what attention returned.
    """

    before: Function
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    after: Function
    needs: tuple[str, ...]
    attention: fx.Node
    one: bool
    """Whether the layer returns one tensor."""

    def attend(self, layer: nn.Module, known: Arguments) -> Any:
        """What the layer's attention module returns, called with values known by name; known from then on."""
        args, kwargs = fx.node.map_arg(
            (self.attention.args, self.attention.kwargs), lambda node: known[_name(node)]
        )
        known[_ATTENDED] = layer.get_submodule(str(self.attention.target))(*args, **kwargs)
        return known[_ATTENDED]


def cut(layer: nn.Module, attention: str, arguments: Arguments) -> Halves:
    """The halves of a layer whose child `attention` it calls once, as it is called with such `arguments`.

    Of the arguments those that are numbers, names, switches or None may decide what the code does.

    Raises:
        Exception: of any kind, since the layer's code runs on stand-ins: it cannot be cut.
    """
    graph = fx.Graph()
    tracer = _Writer(graph)
    inputs = {
        name: value if isinstance(value, _FIXED) else tracer.proxy(graph.placeholder(name))
        for name, value in arguments.items()
    }
    args = [value for name, value in inputs.items() if name.startswith(_PLACE)]
    kwargs = {name: value for name, value in inputs.items() if not name.startswith(_PLACE)}
    output = type(layer).forward(_shell(layer, graph, tracer), *args, **kwargs)
    graph.output(tracer.create_arg(output))

    nodes = list(graph.nodes)
    calls = [node for node in nodes if node.op == "call_module" and node.target == attention]
    if len(calls) != 1:
        raise RuntimeError(f"it calls its attention module {len(calls)} times")
    middle, end = nodes.index(calls[0]), nodes[-1]
    calls[0].name = _ATTENDED
    first = [node for node in nodes[:middle] if node.op != "placeholder"]
    second = nodes[middle + 1 : -1]
    used = {node for later in (calls[0], *second, end) for node in later.all_input_nodes}
    gives = [node for node in first if node in used]
    takes, before = _function(type(layer), first, tuple(gives))
    needs, after = _function(type(layer), second, end.args[0])
    for name in {*takes, *needs} & arguments.keys():
        if not isinstance(arguments[name], Tensor):
            raise TypeError(f"it reads {name}, which is no tensor")
    return Halves(
        before=before,
        takes=takes,
        gives=tuple(node.name for node in gives),
        after=after,
        needs=needs,
        attention=calls[0],
        one=isinstance(end.args[0], fx.Node),
    )


@functools.cache
def followed(after: Function, before: Function) -> Function:
    """A layer's second half and, in one function, the first half of what comes next.

    It takes both modules, then what `after` needs, and gives what `after` returns, then what `before` gives.
    """

    def both(layer: nn.Module, following: nn.Module, *needs: Any) -> list[Any]:
        states = after(layer, *needs)
        return [states, *before(following, states)]

    return both


def _shell(layer: nn.Module, graph: fx.Graph, tracer: fx.proxy.TracerBase) -> nn.Module:
    """A layer without its parts, in whose place stand-ins are."""
    shell = object.__new__(type(layer))
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    vars(shell).update(
        vars(layer)
        | {"_modules": {}, "_parameters": {}, "_buffers": {}}
        | {name: _Child(name, child, tracer) for name, child in layer.named_children()}
        | {name: tracer.proxy(graph.get_attr(name)) for name, _ in tensors}
    )
    return shell


class _StandIn(fx.Proxy):
    """A value that no code may ask for its kind, since it would not say the right one."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise RuntimeError("its code asks for the kind of a value")


class _Writer(fx.proxy.GraphAppendingTracer):
    """Writes a graph by what happens to stand-ins."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)


class _Child:
    """Stands for a module: a call is written down, class and plain attributes are the module's."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # which `isinstance` asks for
        return type(self._module)

    def __init__(self, name: str, module: nn.Module, tracer: fx.proxy.TracerBase) -> None:
        self._name, self._module, self._tracer = name, module, tracer

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_module", self._name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, _FIXED):
            return value
        raise AttributeError(f"it reads {self._name}.{name}")


def _name(node: fx.Node) -> str:
    """Under which a value is known; an argument's may have been changed to be one of Python's."""
    return str(node.target) if node.op == "placeholder" else node.name


def _function(kind: type, nodes: list[fx.Node], output: Any) -> tuple[tuple[str, ...], Function]:
    """Names of what some nodes read of others, and a function of a layer and of that, which runs them."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    read = [node for later in nodes for node in later.all_input_nodes]
    fx.node.map_arg(output, read.append)
    inside = set(nodes)
    needed = [node for node in dict.fromkeys(read) if node not in inside]
    for node in needed:
        copies[node] = graph.placeholder(_name(node))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.node.map_arg(output, copies.__getitem__))
    code = graph.python_code("self")
    return tuple(_name(node) for node in needed), _compiled(kind, code.src, tuple(code.globals.items()))


@functools.cache
def _compiled(kind: type, source: str, known: tuple[tuple[str, Any], ...]) -> Function:
    """The function of a source; one a kind of layer, so that all its layers share what is compiled of it."""
    names = dict(known)
    exec(compile(source, f"<half of {kind.__name__}>", "exec"), names)
    function: Function = names["forward"]
    return function
