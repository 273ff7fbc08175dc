"""Figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from avlprof.errors import UserError
from avlprof.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
UNDATED: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def save_figure(figure: Figure, path: Path | str, suffix: str | None = None) -> Path:
    """Write a figure as PNG, SVG or PDF; returns the path written.

    The file appears whole or not at all, and holds no date, so equal figures are equal files.

    Args:
        figure: what to write.
        path: where to; without `suffix` its end says the format.
        suffix: `png`, `svg` or `pdf`; the path is then taken to end in it, whatever format it names.

    Raises:
        UserError: the format is none of these, or the file cannot be written.
    """
    from avlprof.plots.style import theme

    path = figure_path(path, suffix)
    kind = path.suffix.removeprefix(".").lower()
    with replacing(path) as partial, theme():
        figure.savefig(partial, format=kind, metadata=UNDATED[kind])
    return path


def figure_path(path: Path | str, suffix: str | None = None) -> Path:
    """The path of a figure: `path` itself, or with `suffix` in place of the format that it names.

    A dot that begins no format belongs to the name: `front-0.2` becomes `front-0.2.svg`.

    Raises:
        UserError: the format is not one of `FORMATS`.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if suffix is None:
        if kind not in FORMATS:
            raise UserError(f"figure {path} must end in .png, .svg or .pdf, got '{path.suffix}'")
        return path
    if suffix not in FORMATS:
        raise UserError(f"figure format must be one of {', '.join(FORMATS)}, got '{suffix}'")
    return path.with_name(f"{path.stem if kind in FORMATS else path.name}.{suffix}")
