"""Prompts of forced scoring: their prefill, also under a policy's prefill filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.session import switched
from avlprof.models.generation import first_position, running
from avlprof.policy import Policy, PromptShape, ScorerSpec
from avlprof.runtime.cache import stock_layers
from avlprof.runtime.forced.packing import prefix_key, scorers_of
from avlprof.runtime.forced.prompt import Capture, ForcedCache, Prompts
from avlprof.runtime.forced.score import Head
from avlprof.runtime.prefill_filter import ShortPrefill
from avlprof.runtime.turns import TurnPrefill


@dataclass
class FilteredPrefill:
    """A runtime whose prompts lose vision tokens on their way; decoding steps do not come.

    `shapes` are the prompts' original counts, of which the filter's shares are meant.
    """

    policy: Policy
    shapes: list[PromptShape]
    capture: Capture
    layers: int
    short: ShortPrefill = field(default_factory=ShortPrefill)

    def new_cache(self) -> ForcedCache:
        """A cache that holds nothing, not even a prompt."""
        return ForcedCache(self.layers, 0)

    def owns(self, cache: object) -> bool:
        """Whether a cache is one of those."""
        return isinstance(cache, ForcedCache)

    def governs(self, cache: object, layer: int) -> bool:
        """Every layer's, by hiding what the filter dropped."""
        return True

    def attend(self, forward: Forward, cache: object, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """Stock attention over the tokens that have come so far; the filter then picks those that go on."""
        if not forward.begun:
            forward.begun = True
            self.short.begin()
        modality = forward.modality
        columns = torch.arange(modality.shape[1], device=modality.device).expand(modality.shape)
        if self.short.columns is not None:
            columns, modality = self.short.columns, self.short.modality(modality)
        none = columns[:, None, :0]
        turn = TurnPrefill.behind(call, modality, columns[:, None], none, none.bool())
        if self.short.columns is not None:
            call = call._replace(mask=turn.visible(call.query.shape[1]))
        self.capture.keep(call, turn, columns)
        if call.layer + 1 in self.short.steps:
            self.short.choose(turn, self.policy, self.shapes, call.layer)
        return call.stock(), call


class Prefixes:
    """Prompts of a batch, prefilled when first needed, in an order of their own.

    Args:
        model: the dense model.
        inputs: a left-padded batch as `generate` takes it.
        mask: `[B, N]`, 0 on padding.
        shapes: token counts of each row.
        order: `[B]`, the rows of the batch in the order in which they are wanted.
        head: the model's head.
        scorers: scorers that every run notes, whichever the policies at hand need.
        within: the context in which the model takes these inputs.

    Attributes:
        causal_from: `[B]`, in the order, the column from which on no token is seen by an earlier one, once
            the dense prompts have run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        mask: Tensor,
        shapes: list[PromptShape],
        order: Tensor,
        head: Head,
        scorers: Sequence[ScorerSpec] = (),
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._within = within
        self.model, self.inputs, self.mask, self.shapes = model, inputs, mask, shapes
        self.order, self.head, self.scorers = order, head, scorers
        self._deltas: Tensor | None = None
        self._begin: int | None = None
        self.causal_from = torch.zeros_like(order)
        self._prompts: dict[str, Prompts] = {}
        self._parked: dict[str, Prompts] = {}
        self._views: dict[tuple[str, int, int], Prompts] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held, copies in few bits included."""
        copies = sum(view.copies for view in self._views.values())
        return sum(prompts.nbytes for prompts in self._prompts.values()) + copies

    @property
    def parked(self) -> int:
        """Bytes held on the host."""
        return sum(prompts.nbytes for prompts in self._parked.values())

    def forget(self) -> None:
        """Let go of copies of the prompts in few bits."""
        for view in self._views.values():
            view.forget()

    def drop(self) -> None:
        """Let all prompts go from the device; what is not parked runs again when needed."""
        self._prompts.clear()
        self._views.clear()

    def park(self) -> None:
        """Move all prompts to the host, from where they come back when needed."""
        for key, prompts in self._prompts.items():
            known = self._parked.get(key)
            # what came back from the host unchanged lies there still
            if known is None or known.parts != prompts.parts:
                self._parked[key] = prompts.moved()
        self.drop()

    def keep(self, capture: Capture, policy: Policy) -> None:
        """Take what a run of the prompts under a policy's prefill filter has left."""
        key = prefix_key(policy)
        self._deltas = _deltas(self.model)
        if capture.causal_from is not None:
            self.causal_from = capture.causal_from[self.order]
        if capture.layers:
            self._prompts[key] = capture.prompts().reordered(self.order)
        else:
            self._prompts[key] = self._prompts[key].with_scores(capture.scores, capture.text, self.order)
        self._views = {name: view for name, view in self._views.items() if name[0] != key}

    def prepare(self, policies: Sequence[Policy]) -> None:
        """Run the prompts unless all that the policies need is there; they share a prefill filter."""
        key = prefix_key(policies[0])
        if key not in self._prompts and key in self._parked:
            self._prompts[key] = self._parked[key].moved(self.order.device)
        prompts = self._prompts.get(key)
        specs = scorers_of(policies)
        text = any(policy.text.scored for policy in policies)
        if prompts is None:
            more = [spec for spec in self.scorers if spec not in specs]
            self._run(Capture([*specs, *more], text), policies[0])
            return
        missing = [spec for spec in specs if spec.key not in prompts.scores]
        lacks_text = text and not prompts.text
        if missing or lacks_text:
            self._run(Capture(missing, lacks_text, keep_kv=False), policies[0])

    def rows(self, policy: Policy, rows: slice) -> Prompts:
        """Prompts `rows` of the order, as views."""
        key = prefix_key(policy)
        name = (key, rows.start, rows.stop)
        if name not in self._views:
            self._views[name] = self._prompts[key].rows(rows)
        return self._views[name]

    def last(self, policy: Policy) -> Tensor:
        """Last hidden states `[B, D]` of the prompts' last rows, in the order."""
        return self._prompts[prefix_key(policy)].last

    def positions(self, rows: slice, steps: int) -> Tensor:
        """Positions of the answers' tokens, `[b, T]`, or `[3, b, T]` for multi-axis RoPE."""
        seen = self.mask.sum(dim=1)[self.order][rows]
        text = seen[:, None] + torch.arange(steps, device=seen.device)
        if self._deltas is None:
            return text + self._first
        return (text + self._deltas.to(text.device).view(-1, 1)[self.order][rows])[None].expand(3, -1, -1)

    def _run(self, capture: Capture, policy: Policy) -> None:
        observers = () if policy.prefill_filter else (capture,)
        with ExitStack() as stack:
            runtime = None
            if policy.prefill_filter:
                layers = len(stock_layers(self.model.config.get_text_config(decoder=True)))
                runtime = FilteredPrefill(policy, self.shapes, capture, layers)
                stack.enter_context(runtime.short.hooked(self.model, policy))
            stack.enter_context(switched(self.model, observers=observers, runtime=runtime))
            stack.enter_context(capture.reading_last(self.head, short=True))
            stack.enter_context(self._within())
            positions = self._prompt_positions()
            with running(self.model):
                self.model(**self.inputs, position_ids=positions, use_cache=runtime is not None)
        self.keep(capture, policy)

    def _prompt_positions(self) -> Tensor | None:
        """Positions that skip padding, as `generate` makes them; multi-axis models make their own."""
        if _deltas(self.model) is not None or "mm_token_type_ids" in self.inputs:
            return None
        return (self.mask.long().cumsum(dim=1) - 1).clamp(min=0) + self._first

    @property
    def _first(self) -> int:
        """The first token's position; few bits leave other keys of what is rotated otherwise."""
        if self._begin is None:
            self._begin = first_position(self.model)
        return self._begin


def _deltas(model: PreTrainedModel) -> Tensor | None:
    """Offset of answer positions that multi-axis RoPE models remember of the latest prompt."""
    deltas: Tensor | None = getattr(getattr(model, "model", None), "rope_deltas", None)
    return deltas
