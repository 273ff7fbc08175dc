"""What is known about one row of a batch: sums over rows and steps, ready for the tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avlprof.attention.modality import MODALITIES, Modality
from avlprof.runs.meta import COVERAGES, DISTANCES, LAGS, TEXT_SINK
from avlprof.tracing import statistics


@dataclass(frozen=True)
class RecordOptions:
    """What a recorder measures.

    `rows` is `default` (all text and system rows, `vision_rows` evenly spaced vision rows) or
    `all`; `coverage_rows` bounds the rows of a kind that are sorted for coverage.
    """

    rows: str = "default"
    vision_rows: int = 64
    coverage_rows: int = 16
    top_share: float = 0.1
    text_sink: int = TEXT_SINK
    coverages: tuple[int, ...] = COVERAGES
    distances: tuple[int, ...] = DISTANCES
    lags: tuple[int, ...] = LAGS
    block: int = 64  # query rows of a prompt whose weights exist at a time
    held: int = 1 << 18  # weights of decoding steps held back a layer, to measure them together


@dataclass
class _Sums:
    """Running sums of one layer, phase and kind of query row; every array is `[H, ...]`."""

    rows: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, defined: Tensor | None = None) -> None:
        """Add `value [H, R, ...]` over its rows; undefined entries (NaN) do not count."""
        if defined is None:
            defined = ~value.isnan()
        total, count = value.nan_to_num(0.0).double().sum(dim=1), defined.double().sum(dim=1)
        self.values[name] = self.values[name] + total if name in self.values else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

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
        self._vision = (modality == Modality.VISION).nonzero()[:, 0]

    def query_rows(self) -> list[tuple[str, Tensor]]:
        """The kinds of prompt rows to record, with their positions."""
        kinds = []
        for kind, code in (("system", Modality.SYSTEM), ("vision", Modality.VISION), ("text", Modality.TEXT)):
            rows = (self.modality == code).nonzero()[:, 0]
            if kind == "vision" and self.options.rows != "all":
                rows = _spread(rows, self.options.vision_rows)
            if len(rows):
                kinds.append((kind, rows))
        kinds.append(("last", torch.tensor([len(self.modality) - 1], device=self.modality.device)))
        return kinds

    def add_prefill(self, layer: int, kind: str, rows: Tensor, weights: Tensor) -> None:
        """Take weights `[H, R, N]` of prompt rows of one kind at positions `rows [R]`."""
        sums = self._add(layer, "prefill", kind, rows, weights, self.modality)
        if kind == "last":
            self._last[layer] = weights[:, 0, self._vision].mean(dim=0)
        if kind == "text":
            seen = weights[..., self._vision].mean(dim=0).sum(dim=0)
            known = self._instruction[layer]
            self._instruction[layer] = seen if known is None else known + seen
        assert sums.rows

    def add_step(self, layer: int, weights: Tensor, modality: Tensor) -> None:
        """Take weights `[H, 1, N]` of a decoding step; `modality [N]` covers the tokens so far."""
        held = self._held[layer]
        held.append(weights[:, 0])
        self._grown = modality
        if sum(len(w) * w.shape[1] for w in held) > self.options.held or len(held) >= max(self.options.lags):
            self._measure_steps(layer)

    def _measure_steps(self, layer: int) -> None:
        """Measure the held decoding steps of a layer at once."""
        held, self._held[layer] = self._held[layer], []
        if not held:
            return
        length = held[-1].shape[1]
        weights = torch.stack([torch.nn.functional.pad(w, (0, length - w.shape[1])) for w in held], dim=1)
        rows = torch.tensor([w.shape[1] - 1 for w in held], device=weights.device)
        sums = self._add(layer, "decode", "generated", rows, weights, self._grown[:length])
        if not len(self._vision):
            return
        vision = weights[..., self._vision]
        self._decode[layer].append(vision.mean(dim=0))
        now = statistics.top_sets(vision, self.options.top_share)
        before = self._tops[layer]
        tops = now if before is None else torch.cat([before, now], dim=1)
        for lag in self.options.lags:
            first = max(tops.shape[1] - len(held), lag)
            if first < tops.shape[1]:
                sums.add(f"overlap_{lag}", statistics.set_overlap(tops[:, first:], tops[:, first - lag : -lag]))
        self._tops[layer] = tops[:, -max(self.options.lags) :]

    def frame(self) -> list[dict[str, Any]]:
        """Rows of the stats table (without the sample's id)."""
        self._settle()
        table = []
        for (layer, phase, query), sums in sorted(self._sums.items()):
            means = {name: sums.mean(name) for name in sums.values}
            for head in range(len(means["entropy"])):
                row: dict[str, Any] = {
                    "layer": layer,
                    "head": head,
                    "phase": phase,
                    "query": query,
                    "rows": sums.rows,
                    "mass_sink": float(means["sink"][head]),
                    "entropy": float(means["entropy"][head]),
                    "text_sink": float(means["text_sink"][head]),
                    "distance": means["distance"][head].astype(np.float32).tolist(),
                }
                for i, name in enumerate(MODALITIES):
                    row[f"mass_{name}"] = float(means["mass"][head, i])
                for i, level in enumerate(self.options.coverages):
                    row[f"coverage_{level}"] = float(means["coverage"][head, i]) if "coverage" in means else np.nan
                for lag in self.options.lags:
                    name = f"overlap_{lag}"
                    row[name] = float(means[name][head]) if name in means else np.nan
                table.append(row)
        return table

    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Head-mean vision scores: `last`, `instruction [L, V]`, `decode [steps, L, V]`, fp32."""
        self._settle()
        width = len(self._vision)
        empty = torch.zeros(width)
        text_rows = max(int((self.modality == Modality.TEXT).sum()), 1)
        last = torch.stack([(empty if s is None else s).float().cpu() for s in self._last])
        instruction = torch.stack([(empty if s is None else s).float().cpu() for s in self._instruction]) / text_rows
        measured = [torch.cat(seen).float().cpu() for seen in self._decode if seen]
        steps = min((len(seen) for seen in measured), default=0)
        decode = torch.zeros(steps, len(self._decode), width)
        if len(measured) == len(self._decode):
            decode = torch.stack([seen[:steps] for seen in measured], dim=1)
        return {"last": last.numpy(), "instruction": instruction.numpy(), "decode": decode.numpy()}

    def _settle(self) -> None:
        for layer in range(len(self._held)):
            self._measure_steps(layer)

    def _add(
        self, layer: int, phase: str, kind: str, rows: Tensor, weights: Tensor, modality: Tensor
    ) -> _Sums:
        options = self.options
        sums = self._sums.setdefault((layer, phase, kind), _Sums())
        first_block = sums.rows == 0
        sums.rows += len(rows)
        sums.add("mass", statistics.modality_mass(weights, modality))
        sums.add("sink", weights[..., 0])
        sums.add("entropy", statistics.entropy(weights))
        sink, distance = statistics.text_distances(weights, modality, rows, options.distances, options.text_sink)
        sums.add("text_sink", sink)
        sums.add("distance", distance)
        if len(self._vision) and (first_block or phase == "decode"):
            chosen = torch.arange(len(rows), device=weights.device)
            if phase == "prefill":
                chosen = _spread(chosen, options.coverage_rows)
            sums.add("coverage", statistics.coverage(weights[:, chosen], self._vision, options.coverages))
        return sums


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` evenly spaced entries, first and last included."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long().to(rows.device)]
