"""The task `pages`: questions about scenes, documents, charts and tables that code draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Final

from PIL import Image

from avlprof.tasks.pages.page import draw_page
from avlprof.tasks.sample import Sample
from avlprof.tasks.splits import HELD_OUT, SEARCH
from avlprof.tasks.task import Task, chosen_types

TRAINING_SEEDS: Final = range(1000, 1014)
"""Each renderer of the training has a seed of its own."""

SEEDS: Final[dict[str, int]] = {"train": TRAINING_SEEDS.start, SEARCH: 78, HELD_OUT: 77}
"""Seeds of the splits. `train` are pictures that the model `small` has seen."""

SCENES: Final = (
    *("color_of_shape", "shape_of_color", "position", "right_of", "left_of", "below", "above"),
    *("read_word", "read_number", "color_of_text", "count_shape", "count_color", "count_all", "exists"),
    *("bigger", "list_color", "list_texts", "list_shapes", "describe"),
)
DOCUMENTS: Final = (
    *("title", "date", "total", "value_of_key", "key_of_value", "nth_field", "count_fields", "has_field"),
    *("next_field", "first_word", "last_word", "word_after", "mentions", "paragraph", "read_fields"),
)
CHARTS: Final = (
    *("chart_title", "highest", "lowest", "count_bars", "max_value", "bar_value", "bar_of_value"),
    *("bar_color", "bar_of_color", "compare", "nth_bar", "next_bar", "list_labels", "read_chart"),
)
TABLES: Final = (
    *("cell", "cell_rc", "row_of_value", "max_in_col", "min_in_col", "count_rows", "count_cols", "headers"),
    *("read_row", "read_col", "next_row", "in_table", "table_title", "read_table"),
)
QUESTIONS: Final = (*SCENES, *DOCUMENTS, *CHARTS, *TABLES)
"""All question types, by the kind of page that they are about."""

LONG: Final = ("describe", "paragraph", "read_fields", "read_chart", "read_table")
"""Question types with answers of 30 to 100 tokens, of which a part can be right."""

_MAX_NEW_TOKENS = 160
_PER_TYPE, _MOST = 20, 310


def pages_task(types: str = "") -> Task:
    """The task over the question types in `types`, separated by commas; all when it is empty.

    Each page is asked the one of its questions whose type came up least so far, so that the first n
    samples are as balanced over the types as their pages allow; types that few pages have come up
    less. Pages without a question of these types are passed over. The number in a sample's id is
    that of its page, and an id names the same sample in every selection of types. The metric is
    `rouge_l` when every type is one of `LONG`, since in what is read or described the order counts;
    else `exact_match`.

    `UserError` when a type is unknown.
    """
    chosen = chosen_types("pages", types, QUESTIONS)
    return Task(
        name=f"pages:{','.join(chosen)}" if types.strip() else "pages",
        metric="rouge_l" if set(chosen) <= set(LONG) else "exact_match",
        splits=tuple(SEEDS),
        stream=partial(_stream, chosen),
        max_new_tokens=_MAX_NEW_TOKENS,
        default_samples=min(_PER_TYPE * len(chosen), _MOST),
    )


def _stream(types: tuple[str, ...], split: str) -> Iterator[Sample]:
    seed, asked = SEEDS[split], Counter[str]()
    for number in count():
        questions = {q.group: q for q in reversed(draw_page(seed, number).questions) if q.group in types}
        if not questions:
            continue
        group = min(questions, key=lambda name: (asked[name], types.index(name)))
        asked[group] += 1
        yield Sample(
            id=f"{split}-{number:05d}-{group}",
            images=(partial(picture_of_page, seed, number),),
            prompt=questions[group].prompt,
            answers=(questions[group].answer,),
            group=group,
        )


def picture_of_page(seed: int, number: int) -> Image.Image:
    """The picture of page `number` of a seed."""
    return draw_page(seed, number).image
