"""What is known about one row of a batch: sums over rows and steps, ready for the tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avlprof.attention.modality import MODALITIES, Modality
from avlprof.tracing import statistics
from avlprof.tracing.options import RecordOptions

PROMPT_KINDS = {"system": Modality.SYSTEM, "vision": Modality.VISION, "text": Modality.TEXT}
HELD_STEPS = 32  # decoding steps measured at once, at most


class _Sums:
    """Running sums of one layer, phase and kind of query row; every array is `[H, ...]`."""

    def __init__(self) -> None:
        self.rows = 0
        self.values: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}

    def add(self, name: str, value: Tensor, partial: bool = False) -> None:
        """Add `value [H, R, ...]` over its rows; in a `partial` one NaN is no row of its entry."""
        count: Tensor | int = value.shape[1]
        if partial:
            count = value.isnan().logical_not().sum(dim=1)
            value = value.nan_to_num(0.0)
        self.values[name] = self.values.get(name, 0) + value.sum(dim=1, dtype=torch.float64)
        self.counts[name] = self.counts.get(name, 0) + count

    def mean(self, name: str) -> NDArray[np.float64]:
        """Mean over the defined rows; NaN where there was none."""
        return np.asarray((self.values[name] / self.counts[name]).cpu())


class RowRecord:
    """Statistics and vision scores of one row of a batch (one prompt and its answer).

    `modality [N]` of the prompt without padding; `frame()` and `scores()` are what a run
    directory stores of it.
    """

    def __init__(self, modality: Tensor, layers: int, options: RecordOptions) -> None:
        self.modality = modality
        self.options = options
        self.steps = 0
        self._sums: dict[tuple[int, str, str], _Sums] = {}
        self._last: list[Tensor | None] = [None] * layers
        self._instruction: list[Tensor | None] = [None] * layers
        self._decode: list[list[Tensor]] = [[] for _ in range(layers)]
        self._tops: list[Tensor | None] = [None] * layers
        self._held: list[list[Tensor]] = [[] for _ in range(layers)]
        self._grown = modality
        self._width = int((modality == Modality.VISION).sum())
        self._vision = _columns((modality == Modality.VISION).nonzero()[:, 0])

    @cached_property
    def query_blocks(self) -> list[tuple[str, Tensor, Tensor]]:
        """What to record of the prompt, in blocks: kind, positions of the rows, rows for coverage.

        The last indexes the positions of its block.
        """
        options = self.options
        rows = {kind: (self.modality == code).nonzero()[:, 0] for kind, code in PROMPT_KINDS.items()}
        if options.rows != "all":
            rows["vision"] = _spread(rows["vision"], options.vision_rows)
        rows["last"] = torch.tensor([len(self.modality) - 1], device=self.modality.device)
        blocks = []
        for kind, positions in rows.items():
            for start in range(0, len(positions), options.block):
                block = positions[start : start + options.block]
                covered = torch.isin(block, _spread(positions, options.coverage_rows))
                blocks.append((kind, block, covered.nonzero()[:, 0]))
        return blocks

    def add_prefill(self, layer: int, kind: str, rows: Tensor, covered: Tensor, weights: Tensor) -> None:
        """Take weights `[H, R, N]` of one of the `query_blocks`."""
        self._add((layer, "prefill", kind), rows, covered, weights, self.modality)
        if kind == "last":
            self._last[layer] = weights[:, 0, self._vision].mean(dim=0)
        if kind == "text":
            seen = weights[..., self._vision].mean(dim=0).sum(dim=0)
            known = self._instruction[layer]
            self._instruction[layer] = seen if known is None else known + seen

    def add_step(self, layer: int, weights: Tensor, modality: Tensor) -> None:
        """Take weights `[H, 1, N]` of a decoding step; `modality [N]` covers the tokens so far."""
        held = self._held[layer]
        held.append(weights[:, 0])
        self._grown = modality
        if len(held) >= HELD_STEPS or len(held) * held[-1].numel() > self.options.held:
            self._measure_steps(layer)

    def _measure_steps(self, layer: int) -> None:
        """Measure the held decoding steps of a layer at once."""
        held, self._held[layer] = self._held[layer], []
        if not held:
            return
        heads, length = held[-1].shape
        weights = held[-1].new_zeros((heads, len(held), length))
        for step, seen in enumerate(held):
            weights[:, step, : seen.shape[1]] = seen
        every = torch.arange(len(held), device=weights.device)
        rows = torch.tensor([seen.shape[1] - 1 for seen in held], device=weights.device)
        sums = self._add((layer, "decode", "generated"), rows, every, weights, self._grown[:length])
        if not self._width:
            return
        vision = weights[..., self._vision]
        self._decode[layer].append(vision.mean(dim=0))
        now = statistics.top_sets(vision, self.options.top_share)
        before = self._tops[layer]
        tops = now if before is None else torch.cat([before, now], dim=1)
        for lag in self.options.lags:
            first = max(tops.shape[1] - len(held), lag)
            if first < tops.shape[1]:
                overlap = statistics.set_overlap(tops[:, first:], tops[:, first - lag : -lag])
                sums.add(f"overlap_{lag}", overlap)
        self._tops[layer] = tops[:, -max(self.options.lags, default=1) :]

    def frame(self) -> list[dict[str, Any]]:
        """Rows of the stats table (without the sample's id)."""
        self.settle()
        lists: list[dict[str, Any]] = []
        for (layer, phase, query), sums in sorted(self._sums.items()):
            means = {name: sums.mean(name) for name in sums.values}
            heads = len(means["entropy"])
            none = np.full((heads, len(self.options.coverages)), np.nan)
            columns = {
                "mass_sink": means["sink"],
                "entropy": means["entropy"],
                "text_sink": means["text_sink"],
            }
            columns |= _named("mass", MODALITIES, means["mass"].T)
            columns |= _named("coverage", self.options.coverages, means.get("coverage", none).T)
            overlaps = [means.get(f"overlap_{lag}", none[:, 0]) for lag in self.options.lags]
            columns |= _named("overlap", self.options.lags, overlaps)
            numbers = [column.tolist() for column in columns.values()]
            key = {"layer": layer, "phase": phase, "query": query, "rows": sums.rows}
            distance = means["distance"].astype(np.float32)
            for head, values in enumerate(zip(*numbers, strict=True)):
                row = dict(zip(columns, values, strict=True))
                lists.append(key | {"head": head, "distance": distance[head]} | row)
        return lists

    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Head-mean vision scores: `last`, `instruction [L, V]`, `decode [steps, L, V]`, fp32."""
        self.settle()
        empty = torch.zeros(self._width)
        text_rows = max(int((self.modality == Modality.TEXT).sum()), 1)
        last = torch.stack([(empty if s is None else s).cpu() for s in self._last])
        instruction = torch.stack([(empty if s is None else s).cpu() for s in self._instruction]) / text_rows
        measured = [torch.cat(seen).cpu() for seen in self._decode if seen]
        steps = min((len(seen) for seen in measured), default=0)
        decode = torch.zeros(steps, len(self._decode), self._width)
        if len(measured) == len(self._decode):
            decode = torch.stack([seen[:steps] for seen in measured], dim=1)
        return {"last": last.numpy(), "instruction": instruction.numpy(), "decode": decode.numpy()}

    def settle(self) -> None:
        """Measure the decoding steps that are held back, and let go of their weights."""
        for layer in range(len(self._held)):
            self._measure_steps(layer)

    def _add(
        self, key: tuple[int, str, str], rows: Tensor, covered: Tensor, weights: Tensor, modality: Tensor
    ) -> _Sums:
        options = self.options
        sums = self._sums.setdefault(key, _Sums())
        sums.rows += len(rows)
        sums.add("mass", statistics.modality_mass(weights, modality))
        sums.add("sink", weights[..., 0])
        sums.add("entropy", statistics.entropy(weights))
        sink, distance = statistics.text_distances(
            weights, modality, rows, options.distances, options.text_sink
        )
        sums.add("text_sink", sink)
        sums.add("distance", distance)
        if self._width and len(covered):
            chosen = weights if len(covered) == len(rows) else weights[:, covered]
            sums.add("coverage", statistics.coverage(chosen, self._vision, options.coverages), partial=True)
        return sums


def _columns(index: Tensor) -> Tensor | slice:
    """Ascending indices as a slice where they have no gap: a view instead of a copy."""
    if len(index) and int(index[-1] - index[0]) == len(index) - 1:
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _named(prefix: str, labels: Sequence[Any], columns: Any) -> dict[str, Any]:
    return {f"{prefix}_{label}": column for label, column in zip(labels, columns, strict=True)}


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` evenly spaced entries, first and last included."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long().to(rows.device)]
