"""One question about pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from avlprof.errors import UserError

ImageSource = Path | Image.Image | Callable[[], Image.Image]


@dataclass(frozen=True)
class Sample:
    """A prompt with its pictures and reference answers.

    `images` may be paths, pictures, or functions that draw one; they are opened only when
    `open_images` is called, so a list of samples is cheap. `group` names a kind of question
    within a task (results can be reported by it).
    """

    id: str
    images: tuple[ImageSource, ...]
    prompt: str
    answers: tuple[str, ...] = ()
    group: str = ""

    def open_images(self) -> list[Image.Image]:
        """The pictures as RGB; `UserError` names the sample and the file that cannot be read."""
        return [_open(source, self.id) for source in self.images]


def _open(source: ImageSource, sample: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, Path):
        return source().convert("RGB")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"image {source} of sample '{sample}' does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"image {source} of sample '{sample}' cannot be read: {error}") from None
