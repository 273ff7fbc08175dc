"""One message of a conversation, as a task names its pictures and as a model is shown them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from PIL import Image

from avlprof.errors import UserError
from avlprof.tasks.picture import ImageSource, open_picture
from avlprof.tasks.text import LONGEST_PATH, printable, quoted, shorten
from avlprof.tasks.video import FRAMES, VideoSource, frames_of

__all__ = [
    "FRAMES",
    "ROLES",
    "ImageSource",
    "Message",
    "Role",
    "Turn",
    "VideoSource",
    "frames_of",
    "marked_turn",
    "open_image",
]

Role = Literal["user", "assistant"]
Part = Literal["image", "video", "text"]
ROLES: Final[tuple[Role, ...]] = ("user", "assistant")

_PLACEHOLDER = re.compile(r"<(image|video)(?:[ _](\d{1,4}))?>", re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """A message with its pictures open, RGB: all pictures, then all videos, then the text.

    A video is its frames, in order. Where `offsets` is not empty, picture i stands in the text,
    before its character `offsets[i]`.
    """

    role: Role
    text: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    offsets: tuple[int, ...] = ()

    def pictures(self) -> list[Image.Image]:
        """Pictures and then the frames of the videos, in the order in which the model reads them."""
        return [*self.images, *(frame for video in self.videos for frame in video)]

    def parts(self) -> list[tuple[Part, str]]:
        """Kinds of what the message holds, in order, with the words of a text and else nothing."""
        parts: list[tuple[Part, str]] = []
        if not self.offsets:
            parts += [("image", "") for _ in self.images] + [("video", "") for _ in self.videos]
            return [*parts, ("text", self.text)]
        start = 0
        for offset in self.offsets:
            if self.text[start:offset].strip():
                parts.append(("text", self.text[start:offset]))
            parts.append(("image", ""))
            start = offset
        return [*parts, ("text", self.text[start:])] if self.text[start:].strip() else parts


@dataclass(frozen=True)
class Turn:
    """A message of a conversation; `role` says who wrote it.

    `images` may be paths, pictures, or functions that draw one; `offsets` is as in `Message`. A
    video is a tuple of such frames, a folder of them in natural order, or a film. Nothing is
    opened before `opened`.
    """

    role: Role
    text: str
    images: tuple[ImageSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.offsets and (len(self.offsets) != len(self.images) or self.videos):
            raise UserError(
                f"a message with {len(self.offsets)} offsets for pictures must have as many pictures and no "
                f"videos, got {len(self.images)} and {len(self.videos)}"
            )

    @property
    def marked(self) -> str:
        """The text with `<image>` where a picture stands within it."""
        text = self.text
        for offset in reversed(self.offsets):
            text = f"{text[:offset]}<image>{text[offset:]}"
        return text

    def opened(self, sample: str) -> Message:
        """The message with its pictures; `sample` is whose it is, for messages.

        Raises:
            UserError: a picture or video cannot be read, or a video has no frames.
        """
        images = tuple(open_image(source, sample) for source in self.images)
        videos = tuple(
            tuple(open_image(frame, sample) for frame in frames_of(video, sample)) for video in self.videos
        )
        return Message(self.role, self.text, images, videos, self.offsets)

    def sources(self, sample: str) -> list[ImageSource]:
        """Where its pictures and frames come from, in the order of `Message.pictures`."""
        return [*self.images, *(frame for video in self.videos for frame in frames_of(video, sample))]


def open_image(source: ImageSource, sample: str) -> Image.Image:
    """One picture as RGB, as `open_picture`; `UserError` names the sample and the file."""
    what = f"image {printable(shorten(source, LONGEST_PATH))}" if isinstance(source, Path) else "a picture"
    return open_picture(source, f"{what} of sample '{sample}'")


def marked_turn(
    role: Role, text: str, images: Sequence[ImageSource], videos: Sequence[VideoSource], where: str
) -> Turn:
    """A turn whose text may say where its pictures go: `<image>`, or by number `<image 1>`, `<image_1>`.

    The placeholders go from the text, and pictures come to stand in the order in which the text
    names them. Those before its first word go with their white space, since the model's own chat
    form has the line break between; a text without any has its pictures in front too. `<video>`
    may stand in front alone, as it does in LLaVA's files.

    Args:
        where: begins the message of an error.

    Raises:
        UserError: other placeholders than there are pictures, one named twice, or both kinds.
    """
    marks = list(_PLACEHOLDER.finditer(text))
    pictures = [mark for mark in marks if mark.group(1).lower() == "image"]
    films = [mark for mark in marks if mark.group(1).lower() == "video"]
    _check_marks(pictures, len(images), "image", where)
    _check_marks(films, len(videos), "video", where)
    if not marks:
        return Turn(role, text, tuple(images), tuple(videos))
    order = [int(mark.group(2) or index) for index, mark in enumerate(pictures, start=1)]
    placed = tuple(images[number - 1] for number in order) if order else tuple(images)
    bare = _PLACEHOLDER.sub("", text)
    if not _PLACEHOLDER.sub("", text[: marks[-1].end()]).strip():
        return Turn(role, bare.strip(), placed, tuple(videos))
    if videos:
        raise UserError(f"{where} has <video> or <image> within its text; videos must stand in front of it")
    offsets, gone = [], 0
    for mark in marks:
        offsets.append(mark.start() - gone)
        gone += len(mark.group())
    return Turn(role, bare, placed, (), tuple(offsets))


def _check_marks(marks: list[re.Match[str]], count: int, kind: str, where: str) -> None:
    if not marks:
        return
    numbers = [int(mark.group(2)) for mark in marks if mark.group(2)]
    text = quoted(marks[0].string)
    if numbers and (len(numbers) != len(marks) or sorted(numbers) != list(range(1, count + 1))):
        raise UserError(
            f"{where} must name each of its {count} {kind}s once, as <{kind} 1>, got "
            f"{', '.join(mark.group().strip() for mark in marks)[:80]} in {text}"
        )
    if len(marks) != count:
        raise UserError(
            f"{where} has {len(marks)} placeholders <{kind}> and {count} {kind}s in {text}; "
            "give as many of both"
        )
