"""A decoding step of one layer, and what the steps of a layer come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from avlprof.attention.call import Bounds
from avlprof.runtime.layout import RowPlan
from avlprof.runtime.packed import Stored


@dataclass(frozen=True)
class Step:
    """A decoding step of one layer, as the host knows it before anything runs.

    `slots` are the text slots that the rows' tokens go to, counted from the text part on. The step
    attends to slots `start` to `end` of the buffers; `positions [B, G, n]` are theirs and `mask` is
    bool `[B, 1, 1, n]`, or None where all rows hold all of them; where kernels run, `bounds` say the
    same to them. All are views: what the step writes shows in them. `refreshing`: it picks the core
    anew; `weighing`: sets of query heads whose mean weights are needed afterwards, 0 for none; `stored`:
    what is stored beside the buffers and the step attends to as well, before their slots.
    """

    slots: list[int]
    start: int
    end: int
    positions: Tensor
    mask: Tensor | None
    refreshing: bool
    weighing: int
    bounds: Bounds | None = None
    stored: tuple[Stored, ...] = ()


@dataclass
class Reads:
    """Prompt tokens attended to, summed over rows and steps, save for text that the device counts.

    A stored one in few bits counts what it takes of one in 16.
    """

    steps: int = 0
    refreshes: float = 0.0
    prompt: float = 0.0
    _usual: float = 0.0
    _more: tuple[float, ...] = ()

    def expect(self, plans: list[RowPlan], share: float, always: bool, low: float = 1.0) -> None:
        """Steps from now on read the system and core tokens of these plans, and `always` the stored ones.

        A stored token counts `share`, and one of system or text in few bits `low`.
        """
        self._usual = sum(plan.system + plan.core + low * plan.low for plan in plans)
        self._more = tuple(share * (plan.vision - plan.core) for plan in plans)
        if always:
            self._usual, self._more = self._usual + sum(self._more), ()

    def count(self, text: float, refreshing: bool, share: float) -> None:
        """Note a step that attends to `text` prompt tokens of text beside the expected ones.

        One that is `refreshing` reads `share` of what is kept and not core.
        """
        self.steps += 1
        self.refreshes += refreshing
        self.prompt += self._usual + refreshing * share * sum(self._more) + text

    def refresh(self, due: Sequence[bool], share: float) -> None:
        """Note that the step, which is counted, read `share` of what is kept and not core in rows `due`."""
        self.refreshes += sum(due) / len(due)
        self.prompt += share * sum(more for now, more in zip(due, self._more, strict=True) if now)


@dataclass(frozen=True)
class LayerUse:
    """Measured use of one layer, summed over the rows of the batch.

    Bytes are of keys and values over all KV heads, of 16 bits a number whatever the model runs in, or as
    few as are stored; `prompt` is what is left of the prompt,
    `live` adds generated tokens, `allocated` is the real storage, `dense_prompt` what a stock
    cache would hold of the prompt without padding. `read` is the mean of prompt bytes attended
    to per decoding step. The prompt is that of all turns. `refreshes` is the mean over rows.
    """

    layer: int
    prompt: int
    live: int
    allocated: int
    dense_prompt: int
    read: float
    refreshes: float
    steps: int
