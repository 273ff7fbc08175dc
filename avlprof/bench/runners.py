"""Ways to take decoding steps on one prompt: stock, masked, dense and under a policy."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import modality_map, vision_token_ids
from avlprof.attention.session import switched, with_cache
from avlprof.evaluation.footprint import cache_bytes
from avlprof.policy import Policy
from avlprof.runtime.apply import apply

_CAPTURED = 256  # steps that one capture serves, more than a bench takes between captures
_TILE = 1_000_003  # random numbers drawn; prime, so that repeated they give rows that differ


class Clock:
    """Adds up seconds spent inside the functions that it wraps; waits for CUDA to finish."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - began

        return timed

    def now(self) -> float:
        """Seconds, with all work on the device done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class PromptStates:
    """Random queries, keys and values of a prompt of `length` tokens, as a random model would make them.

    Projections of normed states have mean 0 and variance 1, and so have these; a decoding step costs
    the same behind them, and the prompt need not run. A layer's states are the same at every call.
    """

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    tile: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, length: int) -> PromptStates:
        """For a model's decoder, on its device and in its dtype."""
        config = model.config.get_text_config(decoder=True)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        drawn = torch.randn(_TILE, generator=torch.Generator().manual_seed(0))
        tile = drawn.to(model.device, model.dtype)
        return cls(config.num_attention_heads, config.num_key_value_heads, size, length, tile)

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[1, H, N, D]` (one row, shown N times), key and value `[1, Hkv, N, D]` of a layer."""
        query = self._drawn(3 * index, self.heads, 1).expand(-1, -1, self.length, -1)
        key, value = (self._drawn(3 * index + i, self.kv_heads, self.length) for i in (1, 2))
        return query, key, value

    def _drawn(self, seed: int, heads: int, rows: int) -> Tensor:
        values = self.tile.new_empty(heads * rows * self.head_dim)
        tile = self.tile.roll(4099 * seed)
        for start in range(0, len(values), _TILE):
            part = values[start : start + _TILE]
            part.copy_(tile[: len(part)])
        return values.view(1, heads, rows, self.head_dim)


@dataclass
class Runner:
    """One way to decode: its cache, filled with a prompt, and how a step is taken.

    `policy` None is the stock cache. `hidden [N]` marks prompt positions that a mask takes away (the
    authors' emulation of eviction, which frees nothing). `eager` runs the model's eager attention, and
    `attentions` asks it for its weights. With `captured` steps are captured and replayed, so that their
    attention cannot be timed by itself; `fused` is that of `apply`.
    """

    name: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    batch: int
    policy: Policy | None = None
    hidden: Tensor | None = None
    eager: bool = False
    attentions: bool = False
    captured: int | None = None
    fused: bool | None = None
    cache: Any = None
    taken: int = 0
    _clocked: bool = False
    _modality: Tensor | None = field(default=None, repr=False)
    _prompt: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def replaying(self, fused: bool | None = None) -> Runner:
        """This runner with captured steps, in which what is around attention is compiled if `fused`."""
        name = f"{self.name}, captured" + (", not fused" if fused is False else "")
        return replace(self, name=name, captured=_CAPTURED, fused=fused)

    @torch.inference_mode()
    def fill(self, states: PromptStates) -> None:
        """Fill the cache with a prompt's `states`, and repeat it for every row of the batch.

        Under a policy the prompt is scored and evicted as if the model had run it.
        """
        config = self.model.config.get_text_config(decoder=True)
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        modality = modality_map(ids, mask, vision_token_ids(self.model.config))
        self._modality = modality.expand(self.batch, -1)
        if self.policy is None:
            self.cache = DynamicCache(config=config)
            for index in range(config.num_hidden_layers):
                self.cache.update(*states.layer(index)[1:], index)
            if self.batch > 1:
                self.cache.batch_repeat_interleave(self.batch)
            self._prompt = [(layer.keys, layer.values) for layer in self.cache.layers]
            return
        with apply(self.model, self.policy, captured=self.captured) as runtime:
            self.cache = runtime.new_cache()
            self.cache.active = True  # no model runs here that would say so
            forward = Forward(modality, ids.shape[1], 0)
            for index, layer in enumerate(self.model.get_decoder().layers):
                query, key, value = states.layer(index)
                key, value = self.cache.update(key, value, index)
                call = AttentionCall(
                    layer=index,
                    module=layer.self_attn,
                    query=query,
                    key=key,
                    value=value,
                    mask=None,
                    scaling=states.head_dim**-0.5,
                    softcap=None,
                    kernel=lambda module, query, *args, **options: (query, None),
                    options={},
                )
                runtime.attend(forward, self.cache, call)
            self.cache.active = False
        if self.batch > 1:
            self.cache.batch_repeat_interleave(self.batch)

    def filled_as(self, other: Runner) -> None:
        """Take over another stock runner's prompt, without a copy: a stock step makes one of its own."""
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self._modality, self._prompt = other._modality, other._prompt
        self.rewind()

    def rewind(self) -> None:
        """Let a stock cache forget the steps, and its copies of the prompt."""
        if self.policy is not None:
            return
        for layer, (keys, values) in zip(self.cache.layers, self._prompt, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        self.taken = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the storage behind the cache."""
        return cache_bytes(self.cache)

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        """Take steps; seconds of each, model and cache together."""
        clock, seconds = Clock(self.model.device), []
        with self._engine():
            for _ in range(count):
                inputs = self._step_inputs()
                began = clock.now()
                self.model(**inputs)
                seconds.append(clock.now() - began)
        return seconds

    @torch.inference_mode()
    def event_steps(self, count: int) -> list[float]:
        """Take steps one behind the other; seconds of each by the device's own clock, without a wait."""
        device = self.model.device
        if device.type != "cuda":
            return self.steps(count)
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
        with self._engine():
            events[0].record()
            for event in events[1:]:
                self.model(**self._step_inputs())
                event.record()
            torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]

    @torch.inference_mode()
    def attention_steps(self, count: int) -> list[float]:
        """Take steps; seconds of each inside cache and attention, of all layers; NaN of captured ones."""
        if self.captured is not None:
            return [float("nan")] * count
        clock, seconds = Clock(self.model.device), []
        self._clocked = True  # attention alone: what is handed out of the model is not timed here
        with self._engine(clock), self._timed_update(clock):
            for _ in range(count):
                inputs = self._step_inputs()
                clock.seconds = 0.0
                self.model(**inputs)
                seconds.append(clock.seconds)
        self._clocked = False
        return seconds

    @contextlib.contextmanager
    def _timed_update(self, clock: Clock) -> Iterator[None]:
        self.cache.update = clock.around(self.cache.update)
        try:
            yield
        finally:
            del self.cache.update

    @contextlib.contextmanager
    def _engine(self, clock: Clock | None = None) -> Iterator[None]:
        """The model as this runner wants it; with a clock its attention is timed."""
        with contextlib.ExitStack() as stack:
            if self.eager or self.attentions:
                self.model.set_attn_implementation({"text_config": "eager"})
                stack.callback(self.model.set_attn_implementation, {"text_config": "sdpa"})
            if self.policy is not None:
                stack.enter_context(apply(self.model, self.policy, captured=self.captured, fused=self.fused))
            elif clock is None:
                yield
                return
            session = stack.enter_context(switched(self.model))
            if self._modality is not None:
                seen = self._modality.new_full((self.batch, self.taken), 3)
                session.adopt(self.cache, torch.cat([self._modality, seen], dim=1))
            if clock is not None:
                session.attend = clock.around(session.attend)  # type: ignore[method-assign]
            yield

    def _step_inputs(self) -> dict[str, Any]:
        """A step's inputs; hidden positions are masked, and positions counted without the mask."""
        device = self.model.device
        length = self.inputs["input_ids"].shape[1]
        mask = torch.ones(self.batch, length + self.taken + 1, dtype=torch.long, device=device)
        if self.hidden is not None:
            mask[:, :length][:, self.hidden] = 0
        position = torch.full((self.batch, 1), length + self.taken, device=device)
        self.taken += 1
        return {
            "input_ids": torch.full((self.batch, 1), 9, device=device),
            "attention_mask": mask,
            "position_ids": position,
            **with_cache(self.model, self.cache),
            "output_attentions": self.attentions and not self._clocked,
        }
