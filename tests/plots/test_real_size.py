"""Figures of 32 layers and 32 heads, as a paper prints them: text that is large enough and stands apart."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.plots.real_size import figures

COLUMNS = 7.0
"""Inches: both columns of a two-column paper, across which a wide figure is printed."""
LEAST = 5.95
"""Points of the smallest text in print: 6, and rounding."""


def drawn_texts(figure: Figure) -> list[Text]:
    """Every text that is really drawn, ticks included, where it then stands."""
    canvas, seen = FigureCanvasAgg(figure), dict[int, Text]()
    canvas.draw()  # the first drawing settles the layout
    draw = Text.draw

    def note(self: Text, *args: object, **options: object) -> None:
        if self.get_visible() and self.get_text().strip():
            seen[id(self)] = self
        draw(self, *args, **options)

    with patch.object(Text, "draw", note):
        canvas.draw()
    return list(seen.values())


@pytest.mark.slow  # 25 figures of 32 layers by 32 heads; a small one of each is drawn by test_plots
def test_text_of_every_figure_can_be_read_and_stands_apart() -> None:
    for name, figure in figures().items():
        check(name, figure)


@pytest.mark.slow  # figures of real size
@pytest.mark.parametrize("name", ["heads", "budgets", "words"])
def test_text_of_wide_figures_can_be_read_and_stands_apart(name: str) -> None:
    check(name, figures(name)[name])


def check(name: str, figure: Figure) -> None:
    width, height = figure.get_size_inches()
    scale = min(COLUMNS / width, 1.0)
    texts = drawn_texts(figure)
    assert len(texts) > 5, name
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for text in texts:
        assert text.get_fontsize() * scale >= LEAST, (name, text.get_text(), text.get_fontsize() * scale)
    for text, box in boxes:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width * figure.dpi + 1
        assert inside and box.y1 <= height * figure.dpi + 1, (name, text)
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(across, down) <= 2, (name, a, b)
