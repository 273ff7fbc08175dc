"""Figures of a lens: which word has which cell, in which colour, and what the lines by layer are."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from avlprof import plots
from avlprof.analysis.lens import Lens
from avlprof.analysis.naming import SampleLens
from avlprof.errors import UserError
from avlprof.models.tiles import Tile, dump_tiles
from avlprof.plots.lens import INKS, NAMED, REST, word_colours

WORDS = (" red", "red", " star", "", "\n", *(f"w{i}" for i in range(20)))
TILES = (Tile(0, 2, 3, 4), Tile(8, 1, 1, 1))
"""Details with newlines, and a thumbnail."""


def made(words, layers=(0, 2, 5)):
    """One sample of nine vision tokens in a picture of 2 x 3 details; `words [layers, 9]` are indices."""
    ids = np.asarray(words, dtype=np.int32)[..., None]
    shares = np.linspace(0.1, 0.9, ids.size).reshape(ids.shape).astype(np.float32)
    one = SampleLens("s", "what?", (), dump_tiles([TILES]), ids, shares)
    meta = {"layers": list(layers), "top": 1}
    return Lens(meta, (one,), dict(enumerate(WORDS)))


def picture():
    return Image.new("RGB", (60, 40), (200, 220, 240))


def test_each_cell_has_the_word_of_its_finest_token():
    words = np.random.default_rng(0).integers(0, len(WORDS), (3, 9))
    info = plots.lens_words_info(made(words), picture())
    assert [panel.title for panel in info.panels] == ["Layer 0", "Layer 2", "Layer 5"]
    said = [{"\n": "↵", "": "␣"}.get(WORDS[i], WORDS[i].strip()) for i in range(len(WORDS))]
    counts = {}
    for row, panel in enumerate(info.panels):
        (cells,), (shares,) = panel.words, panel.shares
        assert cells.shape == shares.shape == (2, 3)
        for (r, c), number in np.ndenumerate(cells):
            token = 4 * r + c
            assert info.words[number] == said[words[row, token]]
            assert shares[r, c] == pytest.approx(np.linspace(0.1, 0.9, 27)[9 * row + token], abs=1e-6)
            counts[info.words[number]] = counts.get(info.words[number], 0) + 1
    assert dict(zip(info.words, info.counts, strict=True)) == counts
    assert list(info.counts) == sorted(info.counts, reverse=True)


def test_words_are_drawn_in_their_colours_and_the_rest_in_grey():
    words = [[5 + i % 20 for i in range(9 * row, 9 * row + 9)] for row in range(3)]
    words[0][:5] = [0, 1, 0, 3, 1]
    figure = plots.lens_words(made(words), picture())
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0] == "red 22%"  # four of eighteen cells, with and without a blank before it
    assert legend.get_patches()[0].get_facecolor()[:3] == pytest.approx(np.array([0xD6, 0x22, 0x22]) / 255)
    assert len(names) == NAMED + 1 and names[-1].endswith("%") and "other words" in names[-1]
    assert to_hex(legend.get_patches()[-1].get_facecolor()).upper() == REST


def test_colours_differ_from_each_other():
    for words in (list("abcdefghij"), ["red", "blue", "Green", *"abcdefg"], list(INKS)[:9]):
        colours = word_colours(words)
        assert len(set(colours.values())) == len(words)
        assert all(colours[word] == INKS[word.lower()] for word in words if word.lower() in INKS)


def test_a_single_layer_is_written_down():
    figure = plots.lens_words(made([[0, 2, 5, 0, 6, 7, 8, 0, 1]], (3,)), picture(), layers=[3])
    assert figure.get_suptitle() == "What patches say behind layer 3"
    (ax,) = figure.axes
    assert sorted(text.get_text() for text in ax.texts) == sorted(["red", "star", "w0", "w1", "w2", "w3"])


def test_lines_are_the_means_of_the_table():
    import pandas as pd

    rows = [
        (layer, measure, what, 0.1 * layer + shift, 0.0, 1.0, 4)
        for layer in (0, 1, 2)
        for measure, what, shift in (
            ("thing", "own", 0.2), ("thing", "other", 0.1), ("share", "own", 0.3), ("settled", "own", 0.4)
        )
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["layer", "measure", "what", "mean", "low", "high", "n"])
    info = plots.lens_layers_info(frame.sample(frac=1.0, random_state=0), 4)
    assert info.panels == ("Names what it shows", "How sure, how settled")
    mean, low, _ = info.lines["Names what it shows", "what stands elsewhere"]
    assert mean == pytest.approx([0.1, 0.2, 0.3]) and low == pytest.approx([0, 0, 0])
    assert len(plots.lens_layers(frame, 4).axes) == 2


def test_what_cannot_be_drawn_is_refused():
    lens = made(np.zeros((3, 9), dtype=int))
    for change, said in (
        ({"layers": [1]}, "layer 1 was not read; these were: 0, 2, 5"),
        ({"layers": []}, "at least one layer"),
        ({"sample": "x"}, "sample 'x' was not read"),
        ({"pictures": [picture(), picture()]}, "each of the 2 pictures"),
    ):
        with pytest.raises(UserError, match=said):
            plots.lens_words(lens, **{"pictures": picture()} | change)
