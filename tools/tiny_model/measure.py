"""The measured table of the embedded model: `python -m tools.tiny_model.measure`.

Exact match by question type with the picture and with a blank one, and how accuracy falls when
vision KV is dropped after prefill: at random in all layers, and everything in one layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.models import LoadedModel, load_model
from avlprof.policy import Policy, ScorerSpec
from avlprof.tasks import Sample, load_task

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
LONG = ("describe", "read", "row", "colors")


def by_group(
    loaded: LoadedModel, samples: Sequence[Sample], policy: Policy | None, metric: str
) -> dict[str, float]:
    """Mean score of each question type, in the order of first appearance."""
    answers = generate_answers(loaded, samples, policy, AnswerSettings(72, 32, metric))
    groups = dict.fromkeys(sample.group for sample in samples)
    return {g: float(np.mean([a.score for a in answers if a.group == g])) for g in groups}


def without_pictures(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions about a blank picture."""
    blank = Image.new("RGB", (112, 112), (244, 244, 244))
    return [replace(sample, images=(blank,)) for sample in samples]


def types_table(loaded: LoadedModel, per_type: int) -> str:
    """Markdown: exact match with the picture and without it."""
    task = load_task("shapes")
    count = len({sample.group for sample in task.samples("held-out", 60)})
    samples = task.samples("held-out", per_type * count)
    seen = by_group(loaded, samples, None, "exact_match")
    blind = by_group(loaded, without_pictures(samples), None, "exact_match")
    lines = ["| question | exact match | blank picture |", "|---|---|---|"]
    lines += [f"| {group} | {seen[group]:.2f} | {blind[group]:.2f} |" for group in seen]
    means = [float(np.mean(list(table.values()))) for table in (seen, blind)]
    lines.append(f"| **mean of {len(seen)} types** | **{means[0]:.3f}** | {means[1]:.3f} |")
    return "\n".join(lines)


def drop_table(loaded: LoadedModel, per_type: int) -> str:
    """Markdown: token F1 of the long answers as vision KV is dropped at random, and layer by layer."""
    task = load_task(f"shapes:{','.join(LONG)}")
    samples = task.samples("held-out", per_type * len(LONG))
    lines = [f"| vision KV kept | {' | '.join(LONG)} |", f"|---|{'---|' * len(LONG)}"]

    def line(label: str, keep: float | tuple[float, ...]) -> str:
        policy = Policy(vision_keep=keep, scorer=ScorerSpec(name="random"))
        found = by_group(loaded, samples, policy, "token_f1")
        return f"| {label} | {' | '.join(f'{found[g]:.2f}' for g in LONG)} |"

    lines += [line(f"random {share:.0%} of every layer", share) for share in SHARES]
    layers = loaded.adapter.layers
    for layer in range(layers):
        keep = tuple(0.0 if other == layer else 1.0 for other in range(layers))
        lines.append(line(f"none in layer {layer}, all elsewhere", keep))
    return "\n".join(lines)


def main() -> None:
    """Print both tables for a model folder or the shipped one."""
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--per-type", type=int, default=60)
    args = parser.parse_args()
    loaded = load_model(args.model)
    with torch.inference_mode():
        print(types_table(loaded, args.per_type), "\n")
        print(drop_table(loaded, max(args.per_type // 2, 1)))


if __name__ == "__main__":
    main()
