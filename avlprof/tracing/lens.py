"""What hidden states of vision tokens would say if the model stopped behind a layer: the logit lens.

Each state goes through the model's own final norm and head, and the words with the largest logits are
kept. Nothing else is: states live as long as their layer's hook. What stands between the last layer and
the logits is found by watching the model, not by name, and checked against the logits that it gave.

Source: nostalgebraist, *interpreting GPT: the logit lens*, 2020; on vision tokens: Neo et al., *Towards
Interpreting Visual Information Processing in Vision-Language Models*, arXiv 2410.07149.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avlprof.attention.gate import unwrapped
from avlprof.bisection import largest_share
from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.models.adapter import Adapter
from avlprof.models.finite import not_finite
from avlprof.models.generation import greedy

BLOCK = 64 << 20
"""Bytes of fp32 logits that exist at a time."""


@dataclass(frozen=True)
class Readout:
    """From hidden states behind a layer to logits, as the model itself goes from its last layer on.

    `tail` are the modules between the last layer and the head (the final norm), in order. Logits of the
    head are multiplied by `scale` and then bent to `cap * tanh(logits / cap)`, where the model does so.
    `layers` are those that hand on a state of each token of a prompt: all, unless a model skips some;
    `vocabulary` is the number of logits.
    """

    tail: tuple[nn.Module, ...]
    head: nn.Module
    layers: tuple[int, ...]
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[..., vocabulary]` of hidden states `[..., width]`."""
        for module in self.tail:
            hidden = module(hidden)
        logits: Tensor = self.head(hidden)
        return self.as_given(logits.float())

    def as_given(self, logits: Tensor) -> Tensor:
        """The model's logits, from those of its head."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def top(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of states `[N, width]`: ids int64 and probabilities fp32, `[N, count]` each.

        Logits exist for a block of states at a time.
        """
        ids, shares, at, rows = [], [], 0, 1
        while at < len(hidden):
            logits = self(hidden[at : at + rows])
            best = logits.topk(min(count, logits.shape[-1]), dim=-1)
            ids.append(best.indices)
            shares.append((best.values - logits.logsumexp(dim=-1, keepdim=True)).exp())
            at += rows
            rows = max(BLOCK // (4 * logits.shape[-1]), 1)
        return torch.cat(ids), torch.cat(shares)


@dataclass(frozen=True)
class Spoken:
    """What one prompt's vision tokens say: `ids` int32 and `shares` (probabilities) fp32, `[L, V, top]`."""

    ids: NDArray[np.int32]
    shares: NDArray[np.float32]


@dataclass
class _Seen:
    """What a pass was seen to do behind its last layer.

    `tail` are the outermost modules that were called between the last layer and the head, in order; `whole`
    the layers that hand on a state of each token; `into` and `raw` what the head was given and gave, `given`
    the logits of the model.
    """

    head: nn.Module
    whole: list[int] = field(default_factory=list)
    tail: list[nn.Module] = field(default_factory=list)
    running: nn.Module | None = None
    last: Tensor | None = None
    into: Tensor | None = None
    raw: Tensor | None = None
    given: Tensor | None = None

    def begins(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module is called; those inside another one, and before the last layer, do not count."""
        if self.last is None or self.running is not None or self.into is not None:
            return
        self.running = module
        if module is self.head:
            self.into = args[0] if args and isinstance(args[0], Tensor) else None

    def ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module has returned."""
        if module is not self.running:
            return
        self.running = None
        if module is self.head:
            self.raw = output if isinstance(output, Tensor) else None
        else:
            self.tail.append(module)

    def last_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The last layer has returned."""
        self.last = _state(output)

    def answers(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model has returned; the first pass counts."""
        logits = getattr(output, "logits", None)
        if self.given is None and isinstance(logits, Tensor):
            self.given = logits


def find_readout(adapter: Adapter, encoding: Mapping[str, Tensor]) -> Readout:
    """How a model reads its last layer, from one prompt that is run for it.

    Args:
        encoding: of one prompt, as `Adapter.encode_chats` makes it.

    Raises:
        UserError: the model has no head, or does more between its last layer and its logits than
            modules in a row, a factor or a soft cap.
    """
    model, layers = unwrapped(adapter.model), range(adapter.layers)
    seen, width = _Seen(_head_of(model, adapter)), encoding["input_ids"].shape[1]

    def note(layer: int, hidden: Tensor | None) -> None:
        if hidden is not None and hidden.shape[:2] == (1, width):
            seen.whole.append(layer)

    with _watching(model, adapter.decoder, seen), _reading(adapter.decoder, layers, note):
        with torch.inference_mode():
            greedy(model, encoding, max_new_tokens=1)
    if seen.last is None or seen.into is None or seen.raw is None or seen.given is None:
        raise UserError(
            f"the head of model type '{adapter.family}' reads no hidden state that a hook can see"
        )
    if seen.last.ndim != 3 or not seen.whole:
        raise UserError(
            f"layers of model type '{adapter.family}' hand on {list(seen.last.shape)} for {width} tokens, "
            "not one state a token, so there is nothing for its head to read"
        )
    layers_seen = tuple(dict.fromkeys(seen.whole))
    readout = Readout(tuple(seen.tail), seen.head, layers_seen, seen.raw.shape[-1])
    with torch.inference_mode():
        if not _reaches(readout, seen.last[:, -1:], seen.into[:, -1:]):
            raise UserError(
                f"what model type '{adapter.family}' does between its last layer and its head is not known"
            )
        raw, given = seen.raw[0, -1], seen.given[0, -1].float()
        soft = getattr(adapter.text_config, "final_logit_softcapping", None)
        return _as_given(readout, adapter.family, raw, given, soft)


def _head_of(model: Any, adapter: Adapter) -> nn.Module:
    """What makes logits: the output embeddings of the model, or of the part that holds its decoder.

    Raises:
        UserError: there are none.
    """
    for part in model.modules():
        if hasattr(part, "get_output_embeddings") and adapter.decoder in part.modules():
            head = part.get_output_embeddings()
            if isinstance(head, nn.Module):
                return head
    raise UserError(f"model type '{adapter.family}' has no head that makes words of hidden states")


def _reaches(readout: Readout, hidden: Tensor, into: Tensor) -> bool:
    """Whether the modules of the tail alone lead from the last layer to the head."""
    try:
        for module in readout.tail:
            hidden = module(hidden)
    except (TypeError, ValueError, RuntimeError):
        return False
    near = isinstance(hidden, Tensor) and hidden.shape == into.shape
    return near and _close(hidden.float(), into.float(), into.dtype)


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to some steps of rounding of the largest number."""
    return _distance(ours, theirs) <= 8 * max(float(torch.finfo(dtype).eps), 1e-6)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((ours.to(theirs.device) - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def _as_given(readout: Readout, family: str, raw: Tensor, given: Tensor, soft: float | None) -> Readout:
    """The readout with what turns the head's logits `[vocabulary]` into the model's.

    Args:
        soft: the soft cap that the config names, for models that scale logits before it.

    Raises:
        UserError: it is neither nothing, nor a positive factor, nor a soft cap, nor both.
    """
    dtype, raw, given = raw.dtype, raw.float(), given.to(raw.device)
    if raw.shape == given.shape:
        ways = [readout, _scaled(readout, raw, given)]
        if (cap := _soft_cap(raw, given)) is not None:
            ways.append(replace(readout, cap=cap))
        if soft and float(given.abs().max()) < soft:
            ways.append(_scaled(replace(readout, cap=soft), raw, soft * torch.atanh(given / soft)))
        best = min(ways, key=lambda way: _distance(way.as_given(raw), given))
        if best.scale > 0 and _close(best.as_given(raw), given, dtype):
            return best
    raise UserError(f"what model type '{family}' does to the logits of its head is not known")


def _scaled(readout: Readout, raw: Tensor, given: Tensor) -> Readout:
    """With the factor between two vectors of logits, by least squares."""
    return replace(readout, scale=float(raw @ given / (raw @ raw).clamp(min=1e-30)))


def _soft_cap(raw: Tensor, given: Tensor) -> float | None:
    """The cap c at which `c * tanh(raw / c)` is the given logit, at the one that is bent most."""
    at = int((raw.abs() - given.abs()).argmax())
    x, y = abs(float(raw[at])), abs(float(given[at]))
    if not 0.0 < y < x:
        return None
    return largest_share(lambda cap: cap * math.tanh(x / cap) <= y, y, 1e6, 60)


@contextlib.contextmanager
def _watching(model: nn.Module, decoder: Any, seen: _Seen) -> Iterator[None]:
    inside = {part for layer in decoder.layers for part in layer.modules()}
    handles = [
        decoder.layers[-1].register_forward_hook(seen.last_layer),
        model.register_forward_hook(seen.answers),
    ]
    for module in model.modules():
        if module not in inside:
            handles += [
                module.register_forward_pre_hook(seen.begins),
                module.register_forward_hook(seen.ends),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(output: Any) -> Tensor | None:
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden if isinstance(hidden, Tensor) else None


def read_vision(
    loaded: LoadedModel,
    encoding: Mapping[str, Tensor],
    readout: Readout,
    layers: Sequence[int],
    top: int,
    names: Sequence[str] = (),
) -> list[Spoken]:
    """What the vision tokens of a batch of prompts say behind some layers.

    Args:
        encoding: a left-padded batch, as `Adapter.encode_chats` makes it.
        layers: of which the states are read, among those of the readout. The state behind a layer is what
            it gives, as transformers reports it; what a model adds before the next layer is not in it.
        top: words of each token and layer.
        names: ids of the rows, for sentences about them.

    Raises:
        UserError: a state is not finite, or the model does not take the prompt.
    """
    adapter, model = loaded.adapter, unwrapped(loaded.model)
    vision = adapter.vision_mask(encoding["input_ids"])
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def read(layer: int, hidden: Tensor | None) -> None:
        if hidden is None or layer in found or hidden.shape[:2] != vision.shape:
            return
        chosen = hidden[vision.to(hidden.device)]
        if not bool(chosen.isfinite().all()):
            whose = f"sample '{names[0]}'" if len(names) == 1 else "these samples"
            raise not_finite(f"the hidden states of {whose} behind layer {layer}")
        ids, shares = readout.top(chosen, top)
        found[layer] = (ids.int().cpu(), shares.cpu())

    with _reading(adapter.decoder, layers, read), torch.inference_mode():
        greedy(model, encoding, names, max_new_tokens=1)
    missing = next((layer for layer in layers if layer not in found), None)
    if missing is not None:
        raise UserError(f"layer {missing} of model type '{adapter.family}' hands on no state of each token")
    counts = vision.sum(dim=1).tolist()
    rows = [[torch.split(part, counts) for part in found[layer]] for layer in layers]
    return [
        Spoken(*(torch.stack([row[part][index] for row in rows]).numpy() for part in (0, 1)))
        for index in range(len(counts))
    ]


@contextlib.contextmanager
def _reading(
    decoder: Any, layers: Sequence[int], read: Callable[[int, Tensor | None], None]
) -> Iterator[None]:
    """Hand over what each of some layers gives."""

    def behind(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read(layer, _state(output))

    handles = [decoder.layers[layer].register_forward_hook(partial(behind, layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
