"""Figures as files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from avlprof.errors import UserError
from avlprof.files import replacing
from avlprof.plots.style import theme

FORMATS = ("png", "svg", "pdf")


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a figure as PNG, SVG or PDF, by the suffix of `path`; returns the path.

    The file appears whole or not at all, and holds no date, so equal figures are equal files.

    Raises:
        UserError: the suffix is none of these, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise UserError(f"figure {path} must end in .png, .svg or .pdf, got '{path.suffix}'")
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with replacing(path) as partial, theme():
        figure.savefig(partial, format=kind, metadata=undated)
    return path
