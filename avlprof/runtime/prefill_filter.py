"""Drop vision tokens on the way through the layers of a prompt, without a fork of the model.

Hooks of the decoder layers behind the filter shorten what the model hands them. FastV, arXiv
2403.06764, drops once; PyramidDrop, arXiv 2410.17247, several times.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AtWork
from avlprof.attention.gate import Role, decoder_of, layer_roles
from avlprof.attention.modality import Modality
from avlprof.attention.ranking import best
from avlprof.attention.weights import group_mean
from avlprof.errors import UserError
from avlprof.policy import Policy, PromptShape, tokens
from avlprof.runtime.layout import per_row
from avlprof.scorers import Prefill, make_scorer


class _Cut(threading.local):
    """What a pass has dropped so far; threads may call a model at once."""

    def __init__(self) -> None:
        self.columns: Tensor | None = None
        self.kept: Tensor | None = None
        self.by_layer: dict[int, Tensor] = {}


class ShortPrefill(AtWork):
    """Which tokens of the present prompt go on, layer by layer; empty between prompts.

    `columns` are the prompt's columns that the layer at work sees, `[B, n]`: rows that keep fewer
    begin with columns that were dropped, which `modality` marks as padding. None means all.
    """

    def __init__(self) -> None:
        self.steps: dict[int, float] = {}
        self._cut = _Cut()

    def __deepcopy__(self, memo: dict[int, Any]) -> ShortPrefill:
        """A copy of the model is a stock model: of what its hooks are bound to, nothing is ever cut."""
        return ShortPrefill()

    def begin(self) -> None:
        """A forward pass starts: all tokens go on."""
        self._cut.columns, self._cut.kept, self._cut.by_layer = None, None, {}

    @property
    def columns(self) -> Tensor | None:
        """The columns of the pass of this thread."""
        return self._cut.columns

    def modality(self, whole: Tensor) -> Tensor:
        """Modality `[B, n]` of the tokens that go on, of that of the prompt, `[B, N]`."""
        assert self._cut.columns is not None and self._cut.kept is not None
        return whole.gather(1, self._cut.columns).masked_fill(~self._cut.kept, int(Modality.PAD))

    def choose(self, prefill: Prefill, policy: Policy, rows: list[PromptShape], layer: int) -> None:
        """Pick the tokens that go on behind a layer, by the policy's scorer's mean over heads.

        `rows` are the original counts of the prompt; its shares are meant of them.
        """
        share = self.steps[layer + 1]
        scores = group_mean(make_scorer(policy.scorer).score(prefill), 1)
        vision = prefill.modality == Modality.VISION
        counts = per_row([tokens(share, row.vision) for row in rows], scores.device)[:, 0, 0]
        going = best(scores, vision[:, None], counts)[:, 0] | (prefill.valid & ~vision)
        longest = int(going.sum(dim=1).max())
        if longest == going.shape[1]:
            return
        cut = going.long().argsort(dim=1, stable=True)[:, -longest:]
        before = self._cut.columns
        self._cut.by_layer[layer + 1] = cut
        self._cut.kept = going.gather(1, cut)
        self._cut.columns = cut if before is None else before.gather(1, cut)

    def shorten(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of a decoder layer: hand it the tokens that go on alone."""
        if self.columns is None:
            return None
        if layer in self._cut.by_layer:
            states = args[0] if args else kwargs["hidden_states"]
            states = _at(states, self._cut.by_layer[layer], -3, -2)
            if args:
                args = (states, *args[1:])
            else:
                kwargs = kwargs | {"hidden_states": states}
        dims = {"position_embeddings": (-3, -2), "position_ids": (-2, -1), "attention_mask": (-4, -2)}
        # by position come masks, and what else there is a token, as Gemma's inputs of each layer
        args = (*args[:1], *(_at(value, self.columns, *_dims(value)) for value in args[1:]))
        short = {name: _at(kwargs[name], self.columns, *at) for name, at in dims.items() if name in kwargs}
        return args, kwargs | short

    @contextlib.contextmanager
    def hooked(self, model: PreTrainedModel, policy: Policy) -> Iterator[None]:
        """Hook a model's layers for a policy's filters; nothing is hooked for a policy without.

        Raises:
            UserError: layers behind the filter cannot bear shorter prompts.
        """
        self.steps = {step.after_layer: step.keep for step in policy.prefill_filter}
        handles = []
        if self.steps:
            decoder: Any = decoder_of(model)
            _check(model.config, min(self.steps), policy)
            for index, layer in enumerate(decoder.layers):
                if index >= min(self.steps):
                    hook = partial(self.shorten, index)
                    handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.begin()


def _check(config: Any, first: int, policy: Policy) -> None:
    roles = layer_roles(config.get_text_config(decoder=True))
    start = max(first - 1, 0)
    other = next((index for index in range(start, len(roles)) if roles[index].role is not Role.FULL), None)
    if other is not None:
        raise UserError(
            f"prefill_filter.after_layer {first} needs full attention from the layer before it on, and layer "
            f"{other} {roles[other].what} (policy '{policy.name}'); leave prefill_filter out for this model"
        )
    deep = _last_injection(config)
    if first < deep:
        raise UserError(
            f"prefill_filter.after_layer must be {deep} or more for this model, which adds vision features "
            f"in its first {deep} layers, got {first} (policy '{policy.name}')"
        )


def _last_injection(config: Any) -> int:
    """Layers of the language model until the last that vision features are added at, 0 if there is none.

    Qwen3-VL and its kin add those of as many layers of the vision tower behind their first layers
    (DeepStack, arXiv 2406.04334), Granite Vision 4 at layers that its config names.
    """
    layers = [len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or [])]
    layers += [int(layer) + 1 for _, layer in getattr(config, "deepstack_layer_map", None) or []]
    layers += [int(layer) + 1 for layer in getattr(config, "spatial_target_layers", None) or []]
    return max(layers)


def _dims(value: Any) -> tuple[int, int]:
    """Dimensions of batch and tokens: of a mask `[B, N]` or `[B, 1, N, n]`, else of `[B, N, D]`."""
    return {2: (-2, -1), 4: (-4, -2)}.get(getattr(value, "ndim", 3), (-3, -2))


def _at(value: Any, columns: Tensor, batch: int, dim: int) -> Any:
    """`value` at `columns [B, n]` of its dimension `dim`; its dimension `batch` is B or 1.

    Tuples and dicts are cut inside; None stays.
    """
    if isinstance(value, tuple | list):
        return tuple(_at(part, columns, batch, dim) for part in value)
    if isinstance(value, dict):
        return {name: _at(part, columns, batch, dim) for name, part in value.items()}
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    shape, spread = list(value.shape), [1] * value.ndim
    shape[batch] = spread[batch] = len(columns)
    whole = value.expand(shape)
    shape[dim] = spread[dim] = columns.shape[1]
    return whole.gather(dim, columns.view(spread).expand(shape))
