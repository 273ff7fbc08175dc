"""Samples run again under a policy: what it keeps, computes and drops, beside where attention then goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from avlprof.explore.data import Record
from avlprof.explore.packing import as_text
from avlprof.models import LoadedModel
from avlprof.policy import Policy
from avlprof.runs import RunMeta
from avlprof.runtime.apply import apply
from avlprof.runtime.cache import AVLCache
from avlprof.runtime.layer import AdaptiveLayer
from avlprof.tasks import Sample
from avlprof.tracing.options import RecordOptions
from avlprof.tracing.trace import trace_batch
from avlprof.watch import SILENT, Watch

PARTS = 15
"""Shares of KV heads are stored in so many parts."""
Sets = NDArray[np.uint8]


@dataclass
class States:
    """What a policy holds of one sample's vision tokens behind each pass of the model.

    `sets [passes, L, V]`: the high half of a byte is the share of KV heads that keep the token, the low
    half the share that has it in the core, in fifteenths. `rows[n]` is the pass whose sets row n read
    (0 is the prompt's last row, behind which the first tokens go), and `refreshes` the rows that read
    all that is kept.
    """

    sets: list[Sets] = field(default_factory=list)
    refreshes: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def packed(self) -> dict[str, Any]:
        """As JSON takes it; passes that changed nothing are stored once."""
        distinct: list[Sets] = []
        numbers = []
        for sets in self.sets:
            if not distinct or not np.array_equal(distinct[-1], sets):
                distinct.append(sets)
            numbers.append(len(distinct) - 1)
        stacked = np.stack(distinct)
        return {
            "shape": list(stacked.shape),
            "data": as_text(stacked),
            "rows": [numbers[row] for row in self.rows],
            "refreshes": self.refreshes,
        }


def run_under(
    loaded: LoadedModel, samples: Sequence[Sample], policy: Policy, meta: RunMeta, watch: Watch = SILENT
) -> dict[str, tuple[Record, States]]:
    """Let the model answer samples under a policy, one at a time; recorded as the run `meta` was.

    Raises:
        UserError: the policy does not fit the model, or asks for what the runtime cannot do.
    """
    options = replace(_options(meta), per_head=meta.per_head, text_rows=meta.text_rows)
    found = {}
    for done, sample in enumerate(samples):
        watch.phase("explore", done, len(samples))
        with watched(loaded, policy) as states:
            (traced,) = trace_batch(loaded, [sample], meta.max_new_tokens, options, meta.forced)
        found[sample.id] = Record(traced.sample, pd.DataFrame(traced.stats), traced.scores), states
    watch.phase("explore", len(samples), len(samples))
    return found


def _options(meta: RunMeta) -> RecordOptions:
    return RecordOptions(text_sink=meta.text_sink, coverages=meta.coverages, distances=meta.distances)


@contextlib.contextmanager
def watched(loaded: LoadedModel, policy: Policy) -> Iterator[States]:
    """`apply` with an eye on the sets of one prompt, which is not padded, and of its answer."""
    states, vision = States(), torch.zeros(0, dtype=torch.long)
    with apply(loaded.model, policy) as runtime:

        def look(module: Any, args: Any, passed: dict[str, Any], output: Any) -> None:
            nonlocal vision
            ids, cache = passed.get("input_ids"), runtime.cache
            if cache is None or ids is None:
                return
            if not states.sets:
                vision = loaded.adapter.vision_mask(ids)[0].nonzero()[:, 0].cpu()
            _note(states, cache, vision)

        handle = loaded.model.register_forward_hook(look, with_kwargs=True)
        try:
            yield states
        finally:
            handle.remove()


def _note(states: States, cache: AVLCache, vision: Tensor) -> None:
    """Note what is held behind the pass that has just ended, whose last row is `len(states.sets)`."""
    layers = [cache.governed(index) for index in range(len(cache.layers))]
    adaptive = [layer for layer in layers if isinstance(layer, AdaptiveLayer)]
    row = len(states.sets)
    refreshing = any(layer.picked for layer in adaptive)
    before = row - 1
    if refreshing and cache.policy.refresh != "full":
        before = row  # such a step picks its core before it attends
    elif refreshing:
        states.refreshes.append(row)
    states.rows.append(max(before, 0))
    moves = refreshing or cache.policy.joint is not None
    if states.sets and not moves:
        states.sets.append(states.sets[-1])
        return
    whole = np.full(len(vision), PARTS << 4 | PARTS, dtype=np.uint8)
    sets = [_sets(layer, cache, vision) if isinstance(layer, AdaptiveLayer) else whole for layer in layers]
    states.sets.append(np.stack(sets))


def _sets(layer: AdaptiveLayer, cache: AVLCache, vision: Tensor) -> Sets:
    """uint8 `[V]` of one layer, from the positions that its KV heads hold."""
    if cache.policy.joint is None:
        kept, core = layer.vision_positions(0)
    else:
        kept = core = layer.text_positions(0)
    held, read = (_parts(positions.cpu(), vision) for positions in (kept, core))
    return np.left_shift(held, 4) | read


def _parts(positions: Tensor, vision: Tensor) -> Sets:
    """In how many fifteenths of the heads `positions [G, n]` hold each vision token, rounded up."""
    held = torch.stack([torch.isin(vision, own) for own in positions]).long()
    return np.ceil(held.sum(dim=0).numpy() / len(held) * PARTS).astype(np.uint8)
