"""The frames of a video: a folder of them in the order in which people count, or a film."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from PIL import Image

from avlprof.errors import UserError
from avlprof.tasks.picture import ImageSource, PictureLimits
from avlprof.tasks.text import LONGEST_PATH, printable, shorten

VideoSource = Path | tuple[ImageSource, ...]

FRAMES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Endings of the files that a folder of frames is read for."""

FILMS: Final = frozenset({".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"})
"""Endings by which a path is known for a film."""

RATE: Final = 2.0
"""Frames a second that are taken of a film, as Qwen2-VL and GLM-4V sample theirs."""

LONGEST: Final = 768
"""Frames that a film may give; as in Qwen2-VL's `FPS_MAX_FRAMES`. Longer ones are refused."""

_DIGITS = re.compile(r"(\d+)")
_DECIMAL = re.compile(r"(\d+(?:\.\d+)?)")


def frames_of(video: VideoSource, sample: str) -> tuple[ImageSource, ...]:
    """The frames of a video; files of a folder are not opened, a film is decoded.

    The files of a folder are in natural order (frame2 before frame10), without hidden files. A
    film gives `RATE` frames a second from its start and needs PyAV.

    Raises:
        UserError: it does not exist, holds no frame, cannot be decoded, is longer than `LONGEST`
            frames, or its file names could be read in two orders.
    """
    if not isinstance(video, Path):
        if not video:
            raise UserError(f"a video of sample '{sample}' has no frames; give at least one")
        return video
    name = f"video {printable(shorten(video, LONGEST_PATH))} of sample '{sample}'"
    if os.path.isfile(video):
        return tuple(_film(video, name))
    if not os.path.isdir(video):
        raise UserError(f"{name} does not exist; give a folder of frames or a film")
    try:
        files = [path for path in video.iterdir() if path.suffix.lower() in FRAMES]
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    frames = [path for path in files if not path.name.startswith(".")]
    if not frames:
        raise UserError(f"{name} has no frames; put pictures into the folder")
    return natural(frames, name)


def natural(paths: list[Path], name: str) -> tuple[Path, ...]:
    """Paths in the order of the numbers in their names, `frame2` before `frame10`.

    Raises:
        UserError: numbers with points in them (`0.5`, `0.25`), where counting and decimals differ.
    """
    counted = sorted(paths, key=lambda path: (_pieces(_DIGITS, path.stem), path.name))
    decimal = sorted(paths, key=lambda path: (_pieces(_DECIMAL, path.stem), path.name))
    if counted != decimal:
        pair = next((a.name, b.name) for a, b in zip(counted, decimal, strict=True) if a != b)
        raise UserError(
            f"{name} has names whose order is not clear ({' or '.join(pair)} first?); "
            "number its frames 1, 2, 3"
        )
    return tuple(counted)


def _pieces(number: re.Pattern[str], stem: str) -> list[tuple[float, str]]:
    """Texts and numbers of a name in turn, each as a pair that compares with every other."""
    pieces = number.split(stem)
    return [
        (-1.0, piece.lower()) if index % 2 == 0 else (float(piece[:300]), "")
        for index, piece in enumerate(pieces)
    ]


def _film(path: Path, name: str) -> Iterator[Image.Image]:
    command = f"ffmpeg -i {shorten(path.name)} -vf fps=2 {shorten(path.stem)}/%05d.png"
    remedy = f"write its frames to a folder ({command}) and give that"
    try:
        av = import_module("av")
    except ImportError:
        raise UserError(
            f"{name} is a file, which avlprof does not decode without PyAV; "
            f'pip install "avlprof[video]", or {remedy}'
        ) from None
    taken = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            PictureLimits.from_environment().check((stream.width, stream.height), name)
            start = None
            for frame in container.decode(stream):
                time = float(frame.time or 0.0)
                start = time if start is None else start
                if time - start + 1e-6 < taken / RATE:
                    continue
                if taken == LONGEST:
                    raise UserError(f"{name} gives more than {LONGEST} frames, {RATE:g} a second; cut it")
                taken += 1
                yield _as_played(frame, stream.sample_aspect_ratio)
    except UserError:
        raise
    except Exception as error:  # what libav meets in a damaged file has many types
        reason = printable(shorten(error, 120))
        raise UserError(f"{name} is a file, which avlprof does not decode ({reason}); {remedy}") from None
    if not taken:
        raise UserError(f"{name} is a file, which avlprof does not decode (it has no frames); {remedy}")


def _as_played(frame: Any, pixel: Any) -> Image.Image:
    """A frame as players show it: with square pixels, and turned as telephones note beside the frames."""
    picture: Image.Image = frame.to_image()
    if pixel and pixel != 1:
        picture = picture.resize((max(1, round(picture.width * float(pixel))), picture.height))
    rotation = getattr(frame, "rotation", 0)
    return picture.rotate(rotation, expand=True) if rotation else picture
