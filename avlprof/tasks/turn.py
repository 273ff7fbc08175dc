"""One message of a conversation, as a task names its pictures and as a model is shown them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from PIL import Image, UnidentifiedImageError

from avlprof.errors import UserError

Role = Literal["user", "assistant"]
ROLES: Final[tuple[Role, ...]] = ("user", "assistant")

ImageSource = Path | Image.Image | Callable[[], Image.Image]
VideoSource = Path | tuple[ImageSource, ...]

FRAMES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Endings of the files that a folder of frames is read for."""


@dataclass(frozen=True)
class Message:
    """A message with its pictures open, RGB: all pictures, then all videos, then the text.

    A video is its frames, in order.
    """

    role: Role
    text: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[tuple[Image.Image, ...], ...] = ()

    def pictures(self) -> list[Image.Image]:
        """Pictures and then the frames of the videos, in the order in which the model reads them."""
        return [*self.images, *(frame for video in self.videos for frame in video)]


@dataclass(frozen=True)
class Turn:
    """A message of a conversation; `role` says who wrote it.

    `images` may be paths, pictures, or functions that draw one. A video is a tuple of such frames
    or a folder of them, taken by name; a file of film is not decoded. Nothing is opened before
    `opened`.
    """

    role: Role
    text: str
    images: tuple[ImageSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()

    def opened(self, sample: str) -> Message:
        """The message with its pictures; `sample` is whose it is, for messages.

        Raises:
            UserError: a picture cannot be read, a video is a file or has no frames.
        """
        images = tuple(open_image(source, sample) for source in self.images)
        videos = tuple(
            tuple(open_image(frame, sample) for frame in frames_of(video, sample)) for video in self.videos
        )
        return Message(self.role, self.text, images, videos)

    def sources(self, sample: str) -> list[ImageSource]:
        """Where its pictures and frames come from, in the order of `Message.pictures`."""
        return [*self.images, *(frame for video in self.videos for frame in frames_of(video, sample))]


def frames_of(video: VideoSource, sample: str) -> tuple[ImageSource, ...]:
    """The frames of a video, not opened.

    Raises:
        UserError: it is a file, does not exist, or holds no frame.
    """
    if not isinstance(video, Path):
        if not video:
            raise UserError(f"a video of sample '{sample}' has no frames; give at least one")
        return video
    if video.is_file():
        raise UserError(
            f"video {video} of sample '{sample}' is a file, which avlprof does not decode; write its frames "
            f"to a folder (ffmpeg -i {video.name} -vf fps=2 {video.stem}/%05d.png) and give that"
        )
    if not video.is_dir():
        raise UserError(f"video {video} of sample '{sample}' does not exist; give a folder of frames")
    frames = tuple(sorted(path for path in video.iterdir() if path.suffix.lower() in FRAMES))
    if not frames:
        raise UserError(f"video {video} of sample '{sample}' has no frames; put pictures into the folder")
    return frames


def open_image(source: ImageSource, sample: str) -> Image.Image:
    """One picture as RGB; `UserError` names the sample and the file that cannot be read."""
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
