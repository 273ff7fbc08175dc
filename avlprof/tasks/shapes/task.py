"""The embedded task: questions about pictures that code draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import numpy as np

from avlprof.tasks.sample import Sample
from avlprof.tasks.shapes.questions import QUESTIONS
from avlprof.tasks.shapes.scene import Frame, render, sample_scene, sampled_frame
from avlprof.tasks.splits import HELD_OUT, SEARCH
from avlprof.tasks.task import Task, chosen_types

SEEDS: dict[str, tuple[int, ...]] = {"train": (0, 1, 1), SEARCH: (0, 2), HELD_OUT: (0, 3)}
"""Seeds of the splits; a scene's number is appended. `train` are the pictures that the embedded
model's second training stage saw (at its default seed); the other two differ in the second place."""

LISTS = ("describe", "read", "row", "colors")
"""Question types whose answer is a list, so that a part of it can be right."""

_MAX_NEW_TOKENS = 72  # the longest possible description has at most 60
_PER_TYPE = 20


def shapes_task(types: str = "") -> Task:
    """The task over the question types in `types`, separated by commas; all when it is empty.

    Types take turns, so the first n samples are balanced over them. A scene that allows no
    unambiguous question of the type whose turn it is, is passed over. The number in a sample's
    id is that of its scene, and an id names the same sample in every selection of types. The
    metric is `token_f1` when every type is one of `LISTS`, else `exact_match`.

    `UserError` when a type is unknown.
    """
    return _task("shapes", types, lambda seed: Frame())


def sizes_task(types: str = "") -> Task:
    """The same scenes and questions in pictures of many sizes, for models whose grids follow the picture.

    Width and height are drawn one by one, 88 to 168 pixels; items are as large as in `shapes_task`.
    """
    return _task("shapes-sizes", types, sampled_frame)


def _task(name: str, types: str, frame: Callable[[tuple[int, ...]], Frame]) -> Task:
    chosen = chosen_types(name, types, QUESTIONS)
    return Task(
        name=f"{name}:{','.join(chosen)}" if types.strip() else name,
        metric="token_f1" if set(chosen) <= set(LISTS) else "exact_match",
        splits=tuple(SEEDS),
        stream=partial(_stream, chosen, frame),
        max_new_tokens=_MAX_NEW_TOKENS,
        default_samples=_PER_TYPE * len(chosen),
    )


def _stream(
    types: tuple[str, ...], frame: Callable[[tuple[int, ...]], Frame], split: str
) -> Iterator[Sample]:
    turn = 0
    for number in count():
        question_type = types[turn % len(types)]
        seed = (*SEEDS[split], number)
        scene = sample_scene(seed, frame=frame(seed))
        asked = QUESTIONS[question_type](scene, np.random.default_rng((*seed, 2)))
        if asked is None:
            continue
        prompt, answer = asked
        yield Sample(
            id=f"{split}-{number:05d}-{question_type}",
            images=(partial(render, scene),),
            prompt=prompt,
            answers=(answer,),
            group=question_type,
        )
        turn += 1
