"""The measured tables of the model `small`: `python -m tools.small_model.measure`.

Exact match by question type with the picture and with a blank one; how long answers suffer when vision
KV is dropped after prefill at random in all layers (answers are generated); and what it costs to drop
all vision KV of one layer (the model's own dense answers are read again, which is cheaper).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from avlprof.models import LoadedModel, load_model
from avlprof.policy import Policy
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_task
from avlprof.tasks.pages.canvas import SIDE
from avlprof.tasks.pages.task import LONG
from tools.tiny_model.measure import Subject, drop_table, random_shares, types_table, without_one_layer

SMALL = Subject("pages", LONG, "rouge_l", 160, (SIDE, 245), batch_size=8)
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.0)
MATTERS = 0.002
"""Nat a token that a layer's vision KV must be worth to be among those that matter."""


@dataclass(frozen=True)
class Forced:
    """Long held-out samples with the model's own dense answers, to be read again under policies."""

    layers: int
    answers: ForcedSet

    @classmethod
    def of(cls, loaded: LoadedModel, count: int) -> Forced:
        """Answer the first `count` samples."""
        samples = load_task(f"pages:{','.join(LONG)}").samples("held-out", count)
        size = SMALL.batch_size
        answers = ForcedSet.prepare(loaded, samples, max_new_tokens=SMALL.max_new_tokens, batch_size=size)
        return cls(loaded.adapter.layers, answers)

    def rows(self, policies: dict[str, Policy]) -> dict[str, tuple[float, float]]:
        """By policy: share of tokens that are dense's, and KL to dense in nat a token."""
        scores = self.answers.score_many(list(policies.values()))
        return {
            label: (float(np.mean([s.agreement for s in own])), float(np.mean([s.kl for s in own])))
            for label, own in zip(policies, scores, strict=True)
        }

    def table(self) -> str:
        """Markdown: random shares, single layers, and the layers that matter by themselves alone."""
        single = self.rows(without_one_layer(self.layers))
        chosen = [layer for layer, (_, kl) in enumerate(single.values()) if kl >= MATTERS]
        rows = self.rows(random_shares(SHARES)) | single | self.rows(in_and_out_of(chosen, self.layers))
        lines = ["| vision KV kept | same token as dense | KL, nat a token |", "|---|---|---|"]
        lines += [f"| {label} | {agreement:.3f} | {kl:.3f} |" for label, (agreement, kl) in rows.items()]
        return "\n".join(lines)


def in_and_out_of(chosen: Sequence[int], layers: int) -> dict[str, Policy]:
    """Two policies: all vision KV of the chosen layers and nothing else, and the other way round."""
    inside = tuple(float(layer in chosen) for layer in range(layers))
    names = ", ".join(map(str, chosen))
    return {
        f"all in layers {names}, none elsewhere": Policy(vision_keep=inside),
        f"none in layers {names}, all elsewhere": Policy(vision_keep=tuple(1 - keep for keep in inside)),
    }


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description="Measure the model `small`.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--types", type=int, default=310, help="samples of the table of types; 0: no table")
    parser.add_argument("--shares", type=int, default=50, help="samples of the table of random shares")
    parser.add_argument("--layers", type=int, default=40, help="samples of the table of single layers")
    args = parser.parse_args()
    loaded = load_model(args.model)
    with torch.inference_mode():
        if args.types:
            print(types_table(loaded, SMALL, args.types), "\n", flush=True)
        if args.layers:
            print(Forced.of(loaded, args.layers).table(), "\n", flush=True)
        if args.shares:
            print(drop_table(loaded, SMALL, args.shares, random_shares(SHARES)), flush=True)


if __name__ == "__main__":
    main()
