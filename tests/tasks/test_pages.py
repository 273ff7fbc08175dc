"""The task `pages`: its pictures are those that the model was trained on, and its questions have answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, features

from avlprof.errors import UserError
from avlprof.tasks import load_task
from avlprof.tasks.pages.canvas import CHARACTERS, GRID, KINDS, PATCH, Canvas, Face, Ink
from avlprof.tasks.pages.page import draw_page, is_page
from avlprof.tasks.pages.task import CHARTS, DOCUMENTS, LONG, QUESTIONS, SCENES, SEEDS, TABLES, TRAINING_SEEDS
from avlprof.tasks.pages.words import KNOWN_WORDS, listed, with_article
from avlprof.tasks.shapes.scene import render, sample_scene

RECORDED = {
    (77, 0): ("09208265", "8c73bbc6", "2d143490"),
    (77, 1): ("dfc7690d", "39a671a1", "9a95d180"),
    (77, 2): ("2981854a", "4a10696a", "8f64011a"),
    (77, 3): ("c0d0f043", "bcda7ebc", "7de38a03"),
    (77, 7): ("0e4dc005", "db50a23b", "b156c526"),
    (78, 0): ("199b9339", "8e6bb24b", "3f39d061"),
    (78, 1): ("bf96a4ab", "63725b76", "c0bb5403"),
    (78, 2): ("8e2eb725", "7e772ddd", "9ecfda66"),
    (78, 3): ("d570a7c1", "3763c0d8", "83867c4c"),
    (78, 7): ("baa9be70", "82b9ae2c", "9551cc2c"),
    (1000, 0): ("1a9191e7", "015cf4ed", "d9bb6515"),
    (1000, 1): ("dca24167", "6e8d7c68", "82e5ea96"),
    (1000, 2): ("c9b2f059", "b087f97d", "40e8b2f8"),
    (1000, 3): ("069bb7d9", "d79e3a5d", "f4e1cc17"),
    (1000, 7): ("1c60260b", "2edc61bd", "17027e90"),
    (1013, 0): ("9fe1fca4", "08c4ef83", "4709e7f3"),
    (1013, 1): ("24b3a05a", "917e10f9", "d1066ffc"),
    (1013, 2): ("e36a87d1", "2e57fce2", "6f000eca"),
    (1013, 3): ("3220bcd8", "748d9993", "cd6b4062"),
    (1013, 7): ("0f42ea0e", "ced8d009", "8af038db"),
}
"""Begin of the SHA-256 of picture, questions and patch labels, of the program that drew for the training."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


@pytest.mark.parametrize(("seed", "number"), RECORDED)
def test_pages_are_those_of_the_training(seed: int, number: int) -> None:
    page, (picture, questions, labels) = draw_page(seed, number), RECORDED[seed, number]
    asked = json.dumps([list(question) for question in page.questions]).encode()
    assert digest(asked) == questions
    shown = page.labels
    parts = (shown.kind, shown.color, shown.characters, shown.word, shown.rank)
    assert digest(b"".join(part.tobytes() for part in parts)) == labels
    drawn = digest(np.asarray(page.image).tobytes())
    if drawn != picture and features.version("freetype2") != "2.14.3":
        pytest.skip("letters are drawn by another FreeType, in other shades")
    assert drawn == picture


def test_a_split_repeats_and_does_not_depend_on_how_much_is_asked_for() -> None:
    few, many = (load_task("pages").samples("held-out", n) for n in (5, 30))
    assert [(s.id, s.prompt, s.answers, s.group) for s in few] == [
        (s.id, s.prompt, s.answers, s.group) for s in many[:5]
    ]
    assert few[0].open_images()[0].tobytes() == many[0].open_images()[0].tobytes()


def test_splits_share_no_page_with_each_other_or_with_the_training() -> None:
    assert SEEDS["search"] not in TRAINING_SEEDS and SEEDS["held-out"] not in TRAINING_SEEDS
    drawn = [{draw_page(seed, n).image.tobytes() for n in range(40)} for seed in SEEDS.values()]
    assert len(set.union(*drawn)) == 3 * 40
    ids = [{sample.id for sample in load_task("pages").samples(split, 40)} for split in SEEDS]
    assert len(set.union(*ids)) == 3 * 40


def test_types_come_up_evenly() -> None:
    groups = Counter(sample.group for sample in load_task("pages").samples("search", 200))
    assert len(groups) == len(QUESTIONS) == 62
    assert max(groups.values()) <= 6
    alone = Counter(sample.group for sample in load_task("pages:describe,read_table").samples("search", 12))
    assert alone["describe"] == pytest.approx(6, abs=1)


def test_types_are_all_that_pages_are_asked() -> None:
    kinds = {"scene": SCENES, "document": DOCUMENTS, "chart": CHARTS, "table": TABLES}
    asked: dict[str, set[str]] = {kind: set() for kind in kinds}
    for number in range(150):
        page = draw_page(SEEDS["search"], number)
        asked[page.kind] |= {question.group for question in page.questions}
    for kind, groups in asked.items():
        assert groups <= set(kinds[kind])
        assert len(set(kinds[kind]) - groups) <= 1


def test_a_sample_is_the_same_in_every_selection_of_types() -> None:
    alone = {s.id: s for s in load_task("pages:bar_value").samples("held-out", 20)}
    mixed = {s.id: s for s in load_task("pages").samples("held-out", 300)}
    common = alone.keys() & mixed.keys()
    assert common
    assert all(alone[i].prompt == mixed[i].prompt and alone[i].answers == mixed[i].answers for i in common)


def test_metric_follows_the_types() -> None:
    assert load_task("pages").metric == "exact_match"
    assert load_task(f"pages:{','.join(LONG)}").metric == "rouge_l"
    assert load_task("pages:describe,cell").metric == "exact_match"
    with pytest.raises(
        UserError, match="unknown question type of task 'pages' 'descrbe'; did you mean describe"
    ):
        load_task("pages:descrbe")


def test_answers_can_be_read_off_the_labels() -> None:
    """The words of a title stand in the patches, letter by letter in reading order."""
    for number in range(60):
        page = draw_page(SEEDS["search"], number)
        titles = [q.answer for q in page.questions if q.group in ("title", "chart_title", "table_title")]
        if titles:
            first = page.labels.characters[
                (page.labels.rank == 1) & (page.labels.kind == KINDS.index("text"))
            ]
            letters = "".join(CHARACTERS[int(c) - 1] for c in first.flatten() if c)
            assert letters == titles[0].replace(" ", "")


def test_a_line_of_text_is_labelled_where_it_stands() -> None:
    canvas, face = Canvas((255, 255, 255)), Face("DejaVuSansMono", 12)
    right = canvas.text((PATCH, 5 * PATCH), "stone 7", face, Ink((0, 0, 0), "black"), 3)
    assert right == pytest.approx(PATCH + face.width("stone 7"))
    shown = canvas.labels.kind == KINDS.index("text")
    rows, columns = np.nonzero(shown)
    assert set(rows) == {4} and columns.min() == 1 and columns.max() == int((right - 4) // PATCH)
    letters = canvas.labels.characters[shown]
    assert "".join(CHARACTERS[int(c) - 1] for c in letters.flatten() if c) == "stone7"
    assert KNOWN_WORDS["stone"] in canvas.labels.word and (canvas.labels.rank[shown] == 3).all()
    ink = np.asarray(canvas.image).min(axis=2) < 128
    assert ink.any() and not ink[: 4 * PATCH - 2].any() and not ink[5 * PATCH + 1 :].any()


def test_boxes_are_labelled_unless_there_is_text() -> None:
    canvas = Canvas((255, 255, 255))
    canvas.text((0, PATCH - 2), "ab", Face("DejaVuSans", 12), Ink((0, 0, 0), "black"), 1)
    canvas.box((0, 0, 3 * PATCH, 2 * PATCH), "bar", Ink((214, 32, 32), "red"), 9)
    kinds = np.array(KINDS)[canvas.labels.kind]
    assert (kinds[0, 0], kinds[0, 2], kinds[1, 0], kinds[2, 0]) == ("text", "bar", "bar", "background")
    assert canvas.labels.rank[1, 1] == 9 and canvas.labels.kind.shape == (GRID, GRID)


def test_pages_are_known_and_other_pictures_are_not() -> None:
    assert all(is_page(draw_page(seed, n).image) for seed in (77, 78) for n in range(40))
    assert not is_page(render(sample_scene((0, 2, 1))))
    assert not is_page(Image.effect_noise((336, 336), 80).convert("RGB"))
    x, y = np.mgrid[:336, :336]
    slope = np.stack([x * 0.7, y * 0.7, (x + y) * 0.3], axis=2).astype(np.uint8)
    assert not is_page(Image.fromarray(slope))
    assert not is_page(draw_page(77, 1).image.resize((300, 300)))


def test_words() -> None:
    assert (with_article("red star"), with_article("orange star")) == ("a red star", "an orange star")
    assert [listed(items) for items in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
