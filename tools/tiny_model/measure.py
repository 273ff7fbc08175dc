"""The measured tables of an embedded model: `python -m tools.tiny_model.measure --model tiny-mrope`.

Exact match by question type with the picture and with a blank one, and how accuracy falls when
vision KV is dropped after prefill: at random in all layers, and everything in one layer. Of a model
whose grids follow the picture also how accuracy changes with size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.models import LoadedModel, load_model
from avlprof.models.families.qwen_vl import QwenVLAdapter
from avlprof.policy import Policy, ScorerSpec
from avlprof.tasks import Sample, load_task
from avlprof.tasks.shapes.questions import QUESTIONS
from avlprof.tasks.shapes.scene import Frame, render, sample_scene
from avlprof.tasks.shapes.task import LISTS, SEEDS
from avlprof.tasks.splits import HELD_OUT

DRAWN = ((112, 112), (88, 88), (168, 88), (136, 136), (168, 168))
RESIZED = (136, 96, 88, 80)
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model's own task, its types with long answers, and how these are judged.

    `blank` is the side of a picture in pixels and the tone of one that shows nothing.
    """

    task: str
    long: tuple[str, ...]
    metric: str
    max_new_tokens: int
    blank: tuple[int, int]
    batch_size: int = 32


TINY = Subject("shapes", LISTS, "token_f1", 72, (112, 244))


def by_group(
    loaded: LoadedModel, samples: Sequence[Sample], policy: Policy | None, subject: Subject, metric: str
) -> dict[str, float]:
    """Mean score of each question type, in the order of first appearance."""
    settings = AnswerSettings(subject.max_new_tokens, subject.batch_size, metric)
    answers = generate_answers(loaded, samples, policy, settings)
    groups = dict.fromkeys(sample.group for sample in samples)
    return {g: float(np.mean([a.score for a in answers if a.group == g])) for g in groups}


def without_pictures(samples: Sequence[Sample], subject: Subject) -> list[Sample]:
    """The same questions about a blank picture."""
    side, tone = subject.blank
    blank = Image.new("RGB", (side, side), (tone, tone, tone))
    return [replace(sample, images=(blank,)) for sample in samples]


def types_table(loaded: LoadedModel, subject: Subject, count: int) -> str:
    """Markdown: exact match of `count` held-out samples, by type, with the picture and without it."""
    samples = load_task(subject.task).samples("held-out", count)
    seen = by_group(loaded, samples, None, subject, "exact_match")
    blind = by_group(loaded, without_pictures(samples, subject), None, subject, "exact_match")
    lines = ["| question | exact match | blank picture |", "|---|---|---|"]
    lines += [f"| {group} | {seen[group]:.2f} | {blind[group]:.2f} |" for group in seen]
    means = [float(np.mean(list(table.values()))) for table in (seen, blind)]
    lines.append(f"| **mean of {len(seen)} types** | **{means[0]:.3f}** | {means[1]:.3f} |")
    return "\n".join(lines)


def drop_table(loaded: LoadedModel, subject: Subject, count: int, policies: dict[str, Policy]) -> str:
    """Markdown: score of the long answers to `count` samples, a row a policy."""
    long = subject.long
    samples = load_task(f"{subject.task}:{','.join(long)}").samples("held-out", count)
    lines = [f"| vision KV kept | {' | '.join(long)} |", f"|---|{'---|' * len(long)}"]
    for label, policy in policies.items():
        found = by_group(loaded, samples, policy, subject, subject.metric)
        lines.append(f"| {label} | {' | '.join(f'{found[g]:.2f}' for g in long)} |")
    return "\n".join(lines)


def sizes_table(loaded: LoadedModel, subject: Subject, count: int) -> str:
    """Markdown: mean exact match over types of the same `count` held-out questions by size of picture.

    A picture is drawn anew in another frame, its items as large as before, or resized with all it shows.
    """
    samples = load_task(subject.task).samples("held-out", count)
    side = subject.blank[0]
    lines = ["| pictures | vision tokens | exact match |", "|---|---|---|"]
    sized = [(f"drawn in {w} x {h} px", framed(samples, Frame(w, h))) for w, h in DRAWN]
    sized += [(f"{side} px resized to {to} px", resized(samples, to)) for to in RESIZED]
    for label, those in sized:
        encoding = loaded.adapter.encode_samples(those[:1])
        tokens = int(loaded.adapter.vision_mask(encoding["input_ids"]).sum())
        score = float(np.mean(list(by_group(loaded, those, None, subject, "exact_match").values())))
        lines.append(f"| {label} | {tokens} | {score:.3f} |")
    return "\n".join(lines)


def framed(samples: Sequence[Sample], frame: Frame) -> list[Sample]:
    """The same held-out questions about their scenes drawn in another frame."""
    numbers = [int(sample.id.rsplit("-", 2)[1]) for sample in samples]
    scenes = [sample_scene((*SEEDS[HELD_OUT], number), frame=frame) for number in numbers]
    return [replace(s, images=(partial(render, scene),)) for s, scene in zip(samples, scenes, strict=True)]


def resized(samples: Sequence[Sample], side: int) -> list[Sample]:
    """The same questions about the same pictures, `side` pixels square."""

    def picture(sample: Sample) -> Image.Image:
        return sample.open_images()[0].resize((side, side), Image.Resampling.BICUBIC)

    return [replace(sample, images=(partial(picture, sample),)) for sample in samples]


def random_shares(shares: Sequence[float] = SHARES) -> dict[str, Policy]:
    """Policies that keep a random share of vision KV in every layer."""
    return {f"random {share:.0%} of every layer": _keeping(share) for share in shares}


def without_one_layer(layers: int) -> dict[str, Policy]:
    """Policies that drop all vision KV of one layer, and nothing elsewhere."""
    return {
        f"none in layer {layer}, all elsewhere": _keeping(
            tuple(0.0 if other == layer else 1.0 for other in range(layers))
        )
        for layer in range(layers)
    }


def _keeping(share: float | tuple[float, ...]) -> Policy:
    return Policy(vision_keep=share, scorer=ScorerSpec(name="random"))


def main() -> None:
    """Print the tables for a model folder or a shipped one."""
    parser = argparse.ArgumentParser(description="Measure an embedded model.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--per-type", type=int, default=60)
    args = parser.parse_args()
    loaded = load_model(args.model)
    with torch.inference_mode():
        print(types_table(loaded, TINY, args.per_type * len(QUESTIONS)), "\n", flush=True)
        if isinstance(loaded.adapter, QwenVLAdapter):
            print(sizes_table(loaded, TINY, max(args.per_type // 3, 1) * len(QUESTIONS)), "\n", flush=True)
        policies = random_shares() | without_one_layer(loaded.adapter.layers)
        print(drop_table(loaded, TINY, max(args.per_type // 2, 1) * len(LISTS), policies))


if __name__ == "__main__":
    main()
