"""Figures as data URIs, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from avlprof.plots.style import theme

SHARP = 150
"""Dots per inch of figures with pictures in them."""
PER_INCH = 84
"""CSS pixels an inch of a figure takes at most, so that its text is near the size of the page's."""


@dataclass(frozen=True)
class Embedded:
    """A figure within a page: a data URI, and the most CSS pixels that it should be wide."""

    uri: str
    width: int


def as_svg(figure: Figure) -> Embedded:
    """A figure of lines and shapes; text becomes outlines, so that it looks alike everywhere."""
    buffer = io.StringIO()
    with theme(), mpl.rc_context({"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _embedded(figure, "image/svg+xml", _shorter(buffer.getvalue()).encode())


def as_png(figure: Figure) -> Embedded:
    """A figure with pictures in it, in 256 colours: a third of the size, and hard to tell apart."""
    buffer, small = io.BytesIO(), io.BytesIO()
    with theme():
        figure.savefig(buffer, format="png", dpi=SHARP)
    with Image.open(buffer) as drawn:
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return _embedded(figure, "image/png", small.getvalue())


def _embedded(figure: Figure, kind: str, data: bytes) -> Embedded:
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return Embedded(uri, round(PER_INCH * float(figure.get_size_inches()[0])))


def _shorter(svg: str) -> str:
    """Coordinates cut to a hundredth of a point; factors below 1, as scales of fonts, stay exact."""
    return re.sub(r"(?<![\w.])([1-9]\d*\.\d\d)\d+", r"\1", svg)
