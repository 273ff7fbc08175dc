"""The measured tables of the model `small`: `python -m tools.small_model.measure`.

Exact match by question type with the picture and with a blank one; how long answers suffer when vision
KV is dropped after prefill at random in all layers (answers are generated); and what it costs to drop
all vision KV of one layer (the model's own dense answers are read again, which is cheaper).
"""

from __future__ import annotations

import argparse

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


def forced_table(loaded: LoadedModel, count: int, policies: dict[str, Policy]) -> str:
    """Markdown: how near each policy stays to the dense model on its own long answers, token by token."""
    samples = load_task(f"pages:{','.join(LONG)}").samples("held-out", count)
    forced = ForcedSet.prepare(loaded, samples, max_new_tokens=160, batch_size=SMALL.batch_size)
    lines = ["| vision KV kept | same token as dense | KL, nat a token |", "|---|---|---|"]
    for label, scores in zip(policies, forced.score_many(list(policies.values())), strict=True):
        agreement, kl = (float(np.mean([getattr(s, of) for s in scores])) for of in ("agreement", "kl"))
        lines.append(f"| {label} | {agreement:.3f} | {kl:.3f} |")
    return "\n".join(lines)


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
            policies = random_shares(SHARES) | without_one_layer(loaded.adapter.layers)
            print(forced_table(loaded, args.layers, policies), "\n", flush=True)
        if args.shares:
            print(drop_table(loaded, SMALL, args.shares, random_shares(SHARES)), flush=True)


if __name__ == "__main__":
    main()
