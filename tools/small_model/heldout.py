"""The held-out test: every answer of packed pages, right if each of its tokens is the likeliest.

That is exact match of greedy answers, without generating them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from avlprof.tasks.pages.page import Page, draw_page
from avlprof.tasks.pages.quiz import Question
from avlprof.tasks.pages.task import LONG, SEEDS
from avlprof.tasks.splits import HELD_OUT
from tools.small_model.build import features
from tools.small_model.packing import PagePacker, pictures
from tools.tiny_model.packing import answer_logits, collate

_BLANK = 245


@dataclass
class Scores:
    """By question type: answers, and those that are right."""

    counts: dict[str, list[int]] = field(default_factory=dict)

    def add(self, question: Question, right: bool) -> None:
        """Count one answer."""
        count = self.counts.setdefault(question.group, [0, 0])
        count[0] += 1
        count[1] += right

    def exact(self, long: bool) -> float:
        """Share of right answers among all long or all short ones."""
        chosen = [count for group, count in self.counts.items() if (group in LONG) == long]
        return sum(right for _, right in chosen) / max(1, sum(total for total, _ in chosen))


def held_out(count: int) -> Iterator[tuple[Page, list[Question]]]:
    """Pages with their questions in the order of asking: one long, one of each type, the others."""
    rng = Random(9)
    for number in range(count):
        page = draw_page(SEEDS[HELD_OUT], number)
        long = [question for question in page.questions if question.group in LONG]
        short = [question for question in page.questions if question.group not in LONG]
        rng.shuffle(short)
        first: dict[str, Question] = {}
        for question in short:
            first.setdefault(question.group, question)
        rest = [question for question in short if first[question.group] is not question]
        yield page, [long[number % len(long)], *first.values(), *rest]


@torch.no_grad()
def held_out_scores(
    model: LlavaForConditionalGeneration, packer: PagePacker, count: int, blank: bool = False
) -> Scores:
    """Exact match on the first `count` held-out pages, or with a blank picture in place of each."""
    scores, device = Scores(), model.device
    for page, questions in held_out(count):
        packed, asked = packer(questions)
        images = pictures([page])["images"].to(device)
        if blank:
            images = torch.full_like(images, _BLANK)
        batch = {name: value.to(device) for name, value in collate([packed], 0).items()}
        vision = model.model.multi_modal_projector(features(model, images))
        logits, target, _ = answer_logits(model, vision, batch)
        for question, right in zip(
            asked, _answers_right(packed.segments, packed.weights, logits, target), strict=True
        ):
            scores.add(question, right)
    return scores


def _answers_right(segments: list[int], weights: list[float], logits: Tensor, target: Tensor) -> list[bool]:
    """Of each answer whether all its tokens are the likeliest ones."""
    of = torch.tensor([segment for segment, weight in zip(segments, weights, strict=True) if weight > 0])
    hit = (logits.argmax(-1) == target).cpu()
    return [bool(hit[of == segment].all()) for segment in range(1, max(segments) + 1)]


def table(seen: Scores, blind: Scores) -> str:
    """Markdown: exact match by type, with the picture and with a blank one."""
    lines = ["| question | answers | exact match | blank picture |", "|---|---|---|---|"]
    for group, (total, right) in sorted(seen.counts.items()):
        other = blind.counts.get(group, [1, 0])
        lines.append(f"| {group} | {total} | {right / total:.2f} | {other[1] / other[0]:.2f} |")
    for name, long in (("all short answers", False), ("all long answers", True)):
        lines.append(f"| **{name}** | | **{seen.exact(long):.3f}** | {blind.exact(long):.3f} |")
    return "\n".join(lines)
