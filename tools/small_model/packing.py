"""Pages with their questions packed into sequences, drawn by as many processes as there are cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from avlprof.models.small.assemble import BEGIN, END, IMAGE
from avlprof.tasks.pages.canvas import GRID
from avlprof.tasks.pages.page import Page, draw_page
from avlprof.tasks.pages.quiz import Question
from avlprof.tasks.pages.task import LONG, TRAINING_SEEDS
from tools.small_model.labels import NAMES
from tools.tiny_model.packing import Packed, collate

QUESTION_TOKENS = 445
"""Tokens of questions and answers behind a picture."""

_MOST_QUESTIONS, _LONGEST_ANSWER = 24, 150
_LONG_SHARE = 0.5  # of pages that are asked a question with a long answer
_REPEATS = 2  # of a type, before all other types have come


class PagePacker:
    """Turns a page's questions into one sequence: the picture once, then each question for itself."""

    def __init__(self, tokenizer: Tokenizer, room: int = QUESTION_TOKENS) -> None:
        self._tokenizer, self._room = tokenizer, room
        self._prefix = self._encode(f"{BEGIN}user\n{IMAGE * GRID**2}")
        self._between = self._encode(f"{END}\n{BEGIN}assistant\n")
        self._end = self._encode(END)

    def __call__(self, questions: Sequence[Question]) -> tuple[Packed, list[Question]]:
        """The sequence, and those of the questions that had room."""
        start, ids, packed = len(self._prefix), list(self._prefix), []
        positions, segments, weights = list(range(start)), [0] * start, [0.0] * start
        for question in questions[:]:
            prompt = self._encode(question.prompt) + self._between
            answer = self._encode(question.answer) + self._end
            size = len(prompt) + len(answer)
            if len(ids) - start + size > self._room or len(answer) > _LONGEST_ANSWER:
                continue
            packed.append(question)
            ids += prompt + answer
            positions += range(start, start + size)
            segments += [len(packed)] * size
            weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
            if len(packed) == _MOST_QUESTIONS:
                break
        return Packed(ids, torch.tensor([positions]), segments, weights), packed

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def chosen(questions: Sequence[Question], rng: Random) -> list[Question]:
    """Questions in the order in which they are packed: at times a long one, then even over the types."""
    long = [question for question in questions if question.group in LONG]
    short = [question for question in questions if question.group not in LONG]
    rng.shuffle(short)
    rng.shuffle(long)
    seen: dict[str, int] = {}
    first, rest = [], []
    for question in short:
        seen[question.group] = seen.get(question.group, 0) + 1
        (first if seen[question.group] <= _REPEATS else rest).append(question)
    return [*(long[:1] if rng.random() < _LONG_SHARE else []), *first, *rest]


@dataclass(frozen=True)
class Pages(IterableDataset[dict[str, Tensor]]):
    """Endless batches of pages; each process that draws them has a seed of its own.

    A batch holds `images` uint8 `[B, H, W, 3]` and the labels of the patches; with a packer also the
    packed questions, as `collate` gives them.
    """

    batch: int
    packer: PagePacker | None = None
    first: int = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        torch.set_num_threads(1)
        rng = Random(555 + number)
        for start in count(self.first, self.batch):
            pages = [draw_page(TRAINING_SEEDS[number], start + i) for i in range(self.batch)]
            out = pictures(pages)
            if self.packer is not None:
                out |= collate([self.packer(chosen(page.questions, rng))[0] for page in pages], 0)
            yield out


def pictures(pages: Sequence[Page]) -> dict[str, Tensor]:
    """Images and patch labels of some pages, as a batch."""
    images = torch.from_numpy(np.stack([np.asarray(page.image) for page in pages]))
    labels = {
        name: torch.from_numpy(np.stack([getattr(page.labels, name) for page in pages])) for name in NAMES
    }
    return {"images": images} | labels
