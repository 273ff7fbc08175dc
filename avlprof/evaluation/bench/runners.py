"""Ways to take decoding steps on one prompt: stock, masked, dense and under a policy."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from avlprof.attention.modality import modality_map, vision_token_ids
from avlprof.attention.session import switched
from avlprof.evaluation.footprint import cache_bytes
from avlprof.policy import Policy
from avlprof.runtime import apply


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


@dataclass
class Runner:
    """One way to decode: its cache, filled with a prompt, and how a step is taken.

    `policy` None is the stock cache. `hidden [N]` marks prompt positions that a mask takes away (the
    authors' emulation of eviction, which frees nothing). `attentions` asks for weights, as eager gives.
    """

    name: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    batch: int
    policy: Policy | None = None
    hidden: Tensor | None = None
    attentions: bool = False
    cache: Any = None
    taken: int = 0
    _modality: Tensor | None = field(default=None, repr=False)

    @torch.inference_mode()
    def fill(self) -> None:
        """Run the prompt once, and repeat its cache for every row of the batch."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        with self._engine():
            out = self.model(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        if self.batch > 1:
            self.cache.batch_repeat_interleave(self.batch)
        self._modality = modality_map(ids, mask, vision_token_ids(self.model.config)).expand(self.batch, -1)

    def filled_as(self, other: Runner) -> None:
        """Take over a copy of another stock runner's cache, which saves a prefill."""
        self.cache, self._modality = copy.deepcopy(other.cache), other._modality

    @property
    def kv_bytes(self) -> int:
        """Bytes of the storage behind the cache."""
        return cache_bytes(self.cache)

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        """Take steps; seconds of each, model and cache together."""
        clock, found = Clock(self.model.device), []
        with self._engine():
            for _ in range(count):
                inputs = self._step_inputs()
                began = clock.now()
                self.model(**inputs)
                found.append(clock.now() - began)
        return found

    @torch.inference_mode()
    def attention_steps(self, count: int) -> list[float]:
        """Take steps; seconds of each inside cache and attention, of all layers."""
        clock, found = Clock(self.model.device), []
        with self._engine(clock), self._timed_update(clock):
            for _ in range(count):
                inputs = self._step_inputs()
                clock.seconds = 0.0
                self.model(**inputs)
                found.append(clock.seconds)
        return found

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
            if self.attentions:
                self.model.set_attn_implementation({"text_config": "eager"})
                stack.callback(self.model.set_attn_implementation, {"text_config": "sdpa"})
            runtime = stack.enter_context(apply(self.model, self.policy)) if self.policy else None
            if runtime is None and clock is None:
                yield
                return
            session = stack.enter_context(switched(self.model))
            if self._modality is not None:
                seen = self._modality.new_full((self.batch, self.taken), 3)
                session.adopt(self.cache, torch.cat([self._modality, seen], dim=1))
            if clock is not None and runtime is not None:
                runtime.attend = clock.around(runtime.attend)  # type: ignore[method-assign]
            elif clock is not None:
                session.kernel = clock.around(session.kernel)
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
            "past_key_values": self.cache,
            "use_cache": True,
            "output_attentions": self.attentions,
        }
