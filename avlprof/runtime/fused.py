"""What decoder layers do around attention, compiled for captured steps.

Behind attention and products a step is bound by small kernels: some 45 a layer in the models' own code.
A layer is cut in two at its attention call (see `halves`), which, and with it cache and policy, stays as it
is. What comes behind one layer's attention is compiled as a whole with what comes before the next one's, so
that both residual additions of a layer fuse with the norms behind them. A layer that does not compile so is
compiled in parts, norms and feed-forward part; rotary embeddings are parts always. All this is in place
only while a step is captured: a replay runs what was launched, and prompts never meet it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from avlprof.attention.gate import decoder_of
from avlprof.runtime.graph import opaquely
from avlprof.runtime.halves import Arguments, Function, Halves, cut, followed, form, numbered

_ROTARY = "apply_rotary_pos_emb"  # a global of modeling files
_SHAPES = 256  # that one function may be compiled for: batches, heads, precisions
_FAILURES = (torch._dynamo.exc.TorchDynamoException, RuntimeError)  # of a compiler, or of a launch
_log = logging.getLogger(__name__)

Part = tuple[nn.Module, str, Function]  # a module, the name of the part, the forward call to put in place


@dataclass(frozen=True)
class _Layer:
    """A decoder layer: its attention child's name, its other children and their parts, what follows it."""

    module: nn.Module
    attention: str
    others: list[nn.Module]
    parts: list[Part]
    following: nn.Module | None

    @property
    def name(self) -> str:
        return type(self.module).__name__

    @property
    def plain(self) -> bool:
        """Whether what its children do is in their code alone."""
        modules = [module for child in self.others for module in child.modules()]
        return not any(
            "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
            for module in modules
        )


@dataclass(frozen=True)
class _Ahead:
    """What `function` of a module gives of `states`, worked out before it is called."""

    module: nn.Module
    function: Function
    states: Tensor
    version: int
    values: tuple[Tensor, ...]

    def serves(self, module: nn.Module, function: Function, states: Any) -> bool:
        """Whether just this is asked for, and the states are what they were."""
        same = self.module is module and self.function is function and self.states is states
        return same and self.states._version == self.version


class FusedParts:
    """What is compiled of a model's decoder, each at its first use, without a graph break.

    What does not compile stays as it is: `refused` has the reasons, by name, and a warning says so once.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        """`backend` of `torch.compile`."""
        self.refused: dict[str, str] = {}
        self._backend = backend
        self._known: dict[Function, Function] = {}
        self._cuts: dict[Any, Halves] = {}
        self._ahead: _Ahead | None = None
        self._told: set[str] = set()
        decoder = decoder_of(model)
        norm = getattr(decoder, "norm", None)
        self._layers: dict[nn.Module, _Layer] = {}
        self._parts: list[Part] = [
            (module, name, partial(self._norm, module)) for module, name, _ in self._part(norm)
        ]
        following = [*decoder.layers[1:], *(module for module, _, _ in self._parts)]
        for index, layer in enumerate(decoder.layers):
            self._sort(layer, following[index] if index < len(following) else None)

    @property
    def names(self) -> list[str]:
        """Of layers and parts, without repeats: class and function."""
        layers = self._layers.values()
        parts = [*self._parts, *(part for layer in layers for part in layer.parts)]
        return sorted({name for _, name, _ in parts} | {layer.name for layer in layers})

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model's modules call what is compiled, for the length of the context.

        Inside no gradients are kept, and tensors count their changes, in an inference mode too.
        """
        layers: list[Part] = [
            (module, layer.name, partial(self._layer, layer)) for module, layer in self._layers.items()
        ]
        parts = [part for part in (*self._parts, *layers) if "forward" not in vars(part[0])]
        try:
            with torch.inference_mode(False), torch.no_grad(), _placed(parts):
                yield
        finally:
            self._ahead = None

    def _sort(self, layer: nn.Module, following: nn.Module | None) -> None:
        """Note a layer, or where it cannot be cut its parts."""
        attention = {
            name: child
            for name, child in layer.named_children()
            if isinstance(getattr(child, "layer_idx", None), int)
        }
        for child in attention.values():  # what is around its call
            inner = [module for module in child.children() if not isinstance(module, nn.Linear)]
            self._parts += [part for module in inner for part in self._part(module)]
            self._parts += self._with_rotary(child)
        others = [child for name, child in layer.named_children() if name not in attention]
        parts = [part for child in others for part in self._part(child)]
        if len(attention) == 1 and "forward" not in vars(layer):
            self._layers[layer] = _Layer(layer, next(iter(attention)), others, parts, following)
        else:
            self._parts += parts

    def _part(self, module: nn.Module | None) -> list[Part]:
        """A module as a part, if it can be one."""
        if module is None or "forward" in vars(module) or not any(True for _ in module.parameters()):
            return []
        forward, name = type(module).forward, type(module).__name__
        return [(module, name, partial(self._run, name, forward, module))]

    def _with_rotary(self, attention: nn.Module) -> list[Part]:
        """An attention module whose own forward call finds a compiled rotary embedding."""
        forward: Any = type(attention).forward
        stock = inspect.unwrap(forward)
        if _ROTARY not in stock.__code__.co_names or "forward" in vars(attention):
            return []
        name = f"{type(attention).__name__}.{_ROTARY}"
        rotary = partial(self._run, name, stock.__globals__[_ROTARY])
        return [(attention, name, types.MethodType(with_global(forward, _ROTARY, rotary), attention))]

    def _layer(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        """Call a layer, by halves if they can be compiled."""
        module, following, known = layer.module, layer.following, numbered(args, kwargs)
        halves = self._halves(layer, known)
        if halves is None:
            return self._by_parts(layer, args, kwargs)
        before = self._before(following, known)
        inputs = [known[name] for name in halves.takes]
        values = self._taken(module, halves.before, inputs)
        if values is None:
            values = self._half(layer.name, halves.before, module, *inputs)
        if values is None:
            return self._by_parts(layer, args, kwargs)
        known |= zip(halves.gives, values, strict=True)
        attended = halves.attend(module, known)
        needs = [known[name] for name in halves.needs]
        if before is None or following is None or not halves.one:
            output = self._half(layer.name, halves.after, module, *needs)
        else:
            output = self._half(layer.name, followed(halves.after, before), module, following, *needs)
            if output is not None:
                output, *values = output
                self._ahead = _Ahead(following, before, output, output._version, tuple(values))
        return self._by_parts(layer, args, kwargs, attended) if output is None else output

    def _norm(self, norm: nn.Module, states: Tensor) -> Any:
        """Call the norm behind the last layer, which that may have worked out."""
        forward = type(norm).forward
        values = self._taken(norm, _listed(forward), [states])
        return self._run(type(norm).__name__, forward, norm, states) if values is None else values[0]

    def _taken(self, module: nn.Module, before: Function, inputs: list[Any]) -> tuple[Tensor, ...] | None:
        """What `before` of a module gives, if the layer in front of it has worked it out."""
        ahead, self._ahead = self._ahead, None
        known = ahead is not None and len(inputs) == 1 and ahead.serves(module, before, inputs[0])
        return ahead.values if ahead is not None and known else None

    def _before(self, module: nn.Module | None, arguments: Arguments) -> Function | None:
        """What a module, if it is called with such arguments, works out of the states before it alone."""
        if module is None:
            return None
        if module not in self._layers:
            return _listed(type(module).forward)
        halves = self._halves(self._layers[module], arguments)
        return halves.before if halves is not None and len(halves.takes) == 1 else None

    def _halves(self, layer: _Layer, arguments: Arguments) -> Halves | None:
        """Those of a layer that is called with such arguments, if it can be cut."""
        if layer.name in self.refused or not layer.plain:
            return None
        key = layer.module, layer.module.training, form(arguments)
        if key not in self._cuts:
            try:
                self._cuts[key] = cut(layer.module, layer.attention, arguments)
            except Exception as error:  # of any kind: the layer's code met stand-ins
                self.refused[layer.name] = _first_line(error)
                return None
        return self._cuts[key]

    def _by_parts(self, layer: _Layer, args: Any, kwargs: Any, attended: Any = None) -> Any:
        """Call a layer whose parts are compiled; if it has attended already, without attending again.

        Of a layer that is refused a warning says so, unless it does of one of its parts.
        """
        parts = layer.parts
        if attended is not None:
            parts = [*parts, (layer.module.get_submodule(layer.attention), "", lambda *_, **__: attended)]
        with _placed(parts):
            output = type(layer.module).forward(layer.module, *args, **kwargs)
        if layer.name in self.refused and not any(name in self.refused for _, name, _ in layer.parts):
            self._tell(layer.name, "is fused without its residual additions in captured steps")
        return output

    def _run(self, name: str, stock: Function, *args: Any, **kwargs: Any) -> Any:
        """Call a part, compiled if it can be."""
        if name not in self.refused:
            try:
                return opaquely(self._compiled(stock), *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except _FAILURES as error:
                self.refused[name] = _first_line(error)
                self._tell(name, "is not fused in captured steps")
        return stock(*args, **kwargs)

    def _half(self, name: str, half: Function, *args: Any) -> Any:
        """What a half of a layer gives, compiled; None where it cannot be."""
        try:
            return opaquely(self._compiled(half), *args)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            self.refused[name] = _first_line(error)
            return None

    def _tell(self, name: str, what: str) -> None:
        if name not in self._told:
            self._told.add(name)
            _log.warning("%s %s: %s", name, what, self.refused[name])

    def _compiled(self, stock: Function) -> Function:
        """A function that runs compiled, in contexts too, where what is compiled runs eagerly else.

        They do so for the sake of attention, which is in none.
        """
        if stock not in self._known:
            self._known[stock] = _compiled(stock, self._backend)
        return self._known[stock]


def _compiled(stock: Function, backend: str) -> Function:
    compiled = torch.compile(stock, fullgraph=True, dynamic=False, backend=backend)
    limits = {"recompile_limit": _SHAPES, "accumulated_recompile_limit": _SHAPES}

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("default"), torch._dynamo.config.patch(limits):
            return compiled(*args, **kwargs)

    return run


@contextlib.contextmanager
def _placed(parts: Iterable[Part]) -> Iterator[None]:
    """Have modules call what is put in the place of their forward call."""
    with contextlib.ExitStack() as stack:
        for module, _, forward in parts:
            if "forward" in vars(module):
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(vars(module).pop, "forward")
            module.forward = forward
        yield


@functools.cache
def _listed(forward: Function) -> Function:
    """A module's forward call in the form of a half: what it gives is a list."""

    def before(module: nn.Module, states: Tensor) -> list[Any]:
        return [forward(module, states)]

    return before


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
