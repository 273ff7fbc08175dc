"""What is known about one row of a batch: statistics and scores, ready for the tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.models.finite import not_finite
from avlprof.runs.meta import HEADS
from avlprof.tracing.columns import Columns
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.prompt import (
    ALL,
    INSTRUCTION,
    LAST,
    RECEIVED,
    MeasuredRows,
    PromptAttention,
    PromptSums,
    joined,
    measure_prompt,
)
from avlprof.tracing.steps import LayerSteps
from avlprof.tracing.sums import Sums, all_finite, frames

PREFILL, DECODE = "prefill", "decode"


class RowRecord:
    """Statistics and vision scores of one row of a batch (one prompt and its answer).

    `modality [N]` of the prompt without padding, in host memory, with that of further turns; `steps`
    counts the passes behind the prompt. `frame()` and `scores()` are what a run directory stores of it.

    Memory: the sums are small and do not grow. Decoding scores are 4 bytes x layers x vision
    tokens for each step, in host memory (32 layers, 2,880 tokens: 0.35 MiB a step), and with
    `per_head` as much for each head (of 32 heads 11 MiB a step); what is held back to be measured
    together is bounded by `RecordOptions.step_logits`.
    """

    def __init__(self, modality: Tensor, layers: int, options: RecordOptions) -> None:
        self.modality = modality.cpu()
        self.options = options
        self.steps = 0
        self._grown = self.modality
        self.new = len(self.modality)  # tokens of the latest pass of several
        self._prompt: list[PromptSums | None] = [None] * layers
        self._steps = [LayerSteps(options) for _ in range(layers)]
        self._plans: dict[torch.device, MeasuredRows] = {}
        self._columns: dict[torch.device, Columns] = {}
        self._devices: list[torch.device | None] = [None] * layers
        self.before_settling: Callable[[], None] = lambda: None  # hands over what others hold back

    def plan(self, device: torch.device) -> MeasuredRows:
        """The rows of the prompt that are measured, made once for a device."""
        if device not in self._plans:
            self._plans[device] = MeasuredRows(Columns(self.modality, device, self.options))
        return self._plans[device]

    def add_prompt(self, layer: int, attention: PromptAttention) -> None:
        """Measure the chosen rows of a layer that has attended to the prompt."""
        self._prompt[layer] = measure_prompt(attention, self.plan(attention.key.device))

    def take_prompt(self, layer: int, sums: PromptSums) -> None:
        """Take what the rows of `plan` came to in a layer."""
        self._prompt[layer] = sums

    def extend(self, modality: Tensor) -> None:
        """A pass with several further tokens starts: a part of the prompt, or a turn; as `grow`."""
        for layer in range(len(self._steps)):  # steps so far saw no picture of what follows
            self._measure_steps(layer)
        self.grow(modality)
        self.modality = torch.cat([self.modality, modality])
        self.new, self._plans = len(modality), {}

    def add_turn(self, layer: int, attention: PromptAttention) -> None:
        """Measure the chosen rows of a layer that has attended to the tokens of `extend`."""
        device = attention.key.device
        if device not in self._plans:
            columns = self._columns_on(device)
            self._plans[device] = MeasuredRows(columns, columns.count - self.new)
        self._prompt[layer] = joined(self._prompt[layer], measure_prompt(attention, self._plans[device]))

    def grow(self, modality: Tensor) -> None:
        """A pass with further tokens starts; `modality [n]` of them, padding left out, on the host."""
        self.steps += 1
        self._grown = torch.cat([self._grown, modality])
        self._columns = {}

    def add_step(self, layer: int, logits: Tensor, sinks: Tensor | None = None) -> None:
        """Take logits `[H, n]` of a decoding step over all tokens so far, `UNSEEN` where it did not look.

        `sinks [H]` are the layer's learned ones, if it has any.
        """
        self._devices[layer] = logits.device
        if self._steps[layer].hold(logits, sinks):
            self._measure_steps(layer)

    def add_steps(self, layer: int, logits: Tensor, sinks: Tensor | None) -> None:
        """Take and measure logits `[H, S, n]` of the latest steps, `n` tokens at the newest of them."""
        self._devices[layer] = logits.device
        self._steps[layer].measure_block(logits, sinks, self._columns_on(logits.device))

    @torch.no_grad()
    def settle(self) -> None:
        """Measure the decoding steps that are held back, and let go of their logits."""
        self.before_settling()
        for layer in range(len(self._steps)):
            self._measure_steps(layer)

    def check_finite(self, whose: str = "the prompt") -> None:
        """`UserError` with the first layer whose weights are not finite numbers; `whose` names the row."""
        self.settle()
        self._land()
        if all_finite([sums for _, _, sums in self._sums()]):
            return
        for layer, phase, sums in self._sums():
            if not sums.is_finite:
                when = " while decoding" if phase == DECODE else ""
                raise not_finite(f"the attention weights of {whose} in layer {layer}{when}")

    def _sums(self) -> Iterator[tuple[int, str, Sums]]:
        """What was measured, by layer and phase."""
        for layer, (prompt, steps) in enumerate(zip(self._prompt, self._steps, strict=True)):
            if prompt is not None:
                yield layer, PREFILL, prompt.sums
            yield layer, DECODE, steps.sums

    def frame(self) -> list[dict[str, Any]]:
        """Rows of the stats table (without the sample's id).

        One a head with `per_head`; else one with `head` -1, the mean over heads, of which those
        without a value (coverage where a head gives vision nothing) are left out.

        Raises:
            UserError: weights are not finite numbers.
        """
        self.check_finite()
        known = list(self._sums())
        lists = [
            {"layer": layer, "phase": phase} | row
            for (layer, phase, _), rows in zip(
                known, frames([sums for _, _, sums in known], self.options), strict=True
            )
            for row in rows
        ]
        return sorted(lists, key=lambda row: (row["layer"], row["phase"], row["query"], row["head"]))

    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Attention that single tokens received, mean over query heads, fp32.

        `last` and `instruction [L, V]` are what the last row and the mean text row of the prompt
        gave the vision tokens, `decode [steps, L, V]` what each step did. Of several turns, `last` is
        the last row of the latest, V counts the vision tokens of all, and a row gave 0 to those that
        came behind it. With all rows recorded,
        `all [L, V]` are the column sums over all rows of the prompt. With `options.history`,
        `history [L, T]` are A-VL's scores of the text tokens, prompt text and generated; with
        `options.text_rows`, `text [T, L, V]` is what each text row of the prompt gave.

        With `per_head` each of them stands there head by head as well, as `last_heads [L, H, V]`,
        `decode_heads [steps, L, H, V]` and so on.

        Raises:
            UserError: weights are not finite numbers.
        """
        self.check_finite()
        text_rows = max(int((self.modality == Modality.TEXT).sum()), 1)
        received = self._received()
        heads = {
            "last": received[:, :, LAST],
            "instruction": received[:, :, INSTRUCTION] / text_rows,
            "decode": self._decoded(received.shape),
        }
        if self.options.rows == "all":
            heads["all"] = received[:, :, ALL]
        if self.options.history is not None:
            heads["history"] = self._history(received.shape[1])
        if self.options.text_rows:
            heads["text"] = self._texts(received.shape)
        scores = {name: values.mean(dim=-2) for name, values in heads.items()}
        if self.options.per_head:
            scores |= {f"{name}{HEADS}": values for name, values in heads.items()}
        return {name: np.ascontiguousarray(values.numpy()) for name, values in scores.items()}

    def _land(self) -> None:
        """Copy what the prompt came to from devices to the host, all layers together; wait for copies."""
        for device in {device for device in self._devices if device is not None and device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        prompts = [prompt for prompt in self._prompt if prompt is not None]
        places: list[tuple[Any, str]] = [
            (one.sums, name) for one in prompts for name in ("values", "coverage")
        ]
        places += [(one, name) for one in prompts for name in ("received", "history", "texts")]
        together: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
        for owner, name in places:
            tensor = getattr(owner, name)
            if tensor is not None and tensor.device.type != "cpu":
                together[tensor.device, tensor.dtype, tensor.shape].append((owner, name))
        for group in together.values():
            landed = torch.stack([getattr(owner, name) for owner, name in group]).cpu()
            for (owner, name), tensor in zip(group, landed, strict=True):
                setattr(owner, name, tensor)

    def _received(self) -> Tensor:
        """fp32 `[L, H, 3, V]` of `RECEIVED`; 0 in layers that did not attend."""
        vision = int((self.modality == Modality.VISION).sum())
        found = [None if p is None else _vision_columns(p) for p in self._prompt]
        shape = next((one.shape for one in found if one is not None), (1, len(RECEIVED), vision))
        none = torch.zeros(shape, dtype=torch.float32)
        return torch.stack([none if one is None else one for one in found])

    def _decoded(self, shape: torch.Size) -> Tensor:
        """fp32 `[steps, L, H, V]`; `shape` is that of `_received`."""
        layers, heads, _, vision = shape
        counts = [layer.seeing and layer.sums.kinds["generated"] for layer in self._steps]
        steps = min((count for count in counts if count), default=0)
        scores = torch.zeros(steps, layers, heads, vision, dtype=torch.float32)
        for index, layer in enumerate(self._steps if steps else ()):
            if counts[index]:  # a layer without attention (linear, convolution) has none
                parts = [layer.blind(heads), *layer.scores]
                wide = [torch.nn.functional.pad(part, (0, vision - part.shape[-1])) for part in parts]
                scores[:, index] = torch.cat(wide)[:steps]
        return scores

    def _texts(self, shape: torch.Size) -> Tensor:
        """fp32 `[T, L, H, V]`; `shape` is that of `_received`. 0 in layers that did not attend."""
        known = [None if prompt is None else prompt.texts for prompt in self._prompt]
        rows = next((len(texts[0]) for texts in known if texts is not None), 0)
        none = torch.zeros(shape[1], rows, shape[3], dtype=torch.float32)
        return torch.stack([none if texts is None else texts.cpu() for texts in known]).permute(2, 0, 1, 3)

    def _history(self, heads: int) -> Tensor:
        """fp32 `[L, H, T]`: the prompt's rows and the steps' together."""
        text = (self._grown == Modality.TEXT) | (self._grown == Modality.GENERATED)
        total = torch.zeros(len(self._steps), heads, int(text.sum()), dtype=torch.float64)
        for layer, prompt, steps in zip(total, self._prompt, self._steps, strict=True):
            for part in (None if prompt is None else prompt.history, steps.history):
                if part is not None:
                    layer[:, : part.shape[-1]] += part.cpu()
        return total.float()

    def _measure_steps(self, layer: int) -> None:
        device = self._devices[layer]
        if device is None:
            return
        self._steps[layer].measure(self._columns_on(device))

    def _columns_on(self, device: torch.device) -> Columns:
        """Columns of all tokens so far."""
        if device not in self._columns:
            self._columns[device] = Columns(self._grown, device, self.options)
        return self._columns[device]


def _vision_columns(sums: PromptSums) -> Tensor:
    """fp32 `[H, 3, V]`, on the host."""
    received = sums.received.cpu()
    return received if sums.columns is None else received[..., sums.columns]
