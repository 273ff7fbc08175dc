"""From what a file or a user writes for a picture to where the picture lies."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from avlprof.errors import UserError
from avlprof.tasks.picture import ImageSource, open_picture
from avlprof.tasks.text import LONGEST_PATH, printable, quoted, shorten
from avlprof.tasks.video import VideoSource

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,3}(?=[^/])")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_SHORTEST_BASE64 = 60  # a picture of one pixel takes more
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as the bytes of its file, decoded when it is called.

    `read` gives the bytes, which may lie in an archive; `name` begins the message of an error.
    """

    name: str
    read: Callable[[], bytes] = field(repr=False)

    def __call__(self) -> Image.Image:
        """The picture as RGB; `UserError` as `open_picture`."""
        return open_picture(self.read(), self.name)


def local_path(text: str | Path, what: str = "path") -> Path:
    """The path that a user wrote: `~` is expanded, `file://` taken off, other URLs are refused.

    A `Path` made from a URL has lost a slash (`https:/...`) and is known for one all the same.

    Raises:
        UserError: a URL of the network.
    """
    scheme = _SCHEME.match(str(text))
    if scheme is None:
        return Path(os.path.expanduser(text))
    if scheme.group(1).lower() != "file":
        url = f"{scheme.group(1)}://{str(text)[scheme.end() :]}"
        raise UserError(f"{what} {printable(shorten(url))} is a URL; download it first and give the file")
    rest = str(text)[scheme.end() :]
    if str(text)[: scheme.end()].count("/") != 2:  # file:///a and, as a Path, file:/a
        return Path("/" + unquote(rest))
    host, _, path = rest.partition("/")
    if host not in ("localhost", "~"):  # file://a/b names a host in the standard; people mean a path
        return Path(unquote(rest))
    return Path(os.path.expanduser("~")) / unquote(path) if host == "~" else Path("/" + unquote(path))


def picture_source(value: object, folder: Path, name: str) -> ImageSource:
    """What one entry of a file says of a picture: a path, a data URI, base64, bytes, or a record.

    A record is `{"bytes": ..., "path": ...}` as datasets writes it, or `{"url": ...}`. Of a path
    that is not below `folder`, `images` beside the file is tried too.

    Args:
        folder: what relative paths start from.
        name: begins the message of an error, as `mine.jsonl:3: image`.

    Raises:
        UserError: a URL of the network, or a value that is no picture.
    """
    if isinstance(value, dict) and any(value.get(key) for key in ("bytes", "path", "url")):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, Image.Image | EncodedPicture):
        return value
    if isinstance(value, bytes | bytearray):
        data = bytes(value)
        return EncodedPicture(name, lambda: data)
    if isinstance(value, Path):
        return _file(value, folder, name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} must be a path, got {quoted(value)}")
    if value[:5].lower() == "data:":
        return EncodedPicture(name, lambda: _data_of_uri(value, name))
    return _written(value, folder, name)


def _file(path: Path, folder: Path, name: str) -> Path:
    if str(path)[:5].lower() == "data:":
        raise UserError(
            f"{name} is a data URI, which a path cannot hold; give it as text, or save the picture"
        )
    return folder / local_path(path, name)


def _written(value: str, folder: Path, name: str) -> ImageSource:
    """A path, or base64 where there is no such file."""
    path = folder / local_path(value, name)
    if os.path.isfile(path):
        return path
    if _looks_encoded(value):
        return EncodedPicture(name, lambda: _decoded(value, name))
    beside = folder / "images" / value
    if os.path.isfile(beside):
        return beside
    return path


def video_source(value: object, folder: Path, name: str) -> VideoSource:
    """What an entry says of a video: the path of a folder or film, or a list of pictures.

    Raises:
        UserError: neither; `name` begins its message.
    """
    if isinstance(value, str) and value:
        return folder / local_path(value, name)
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{name} must be a list of folders of frames, of films, or of lists of paths, got {quoted(value)}"
        )
    return tuple(picture_source(frame, folder, name) for frame in value)


def numbered_picture(number: object, subset: object, folder: Path, where: str) -> Path:
    """The file of a picture that a dataset names by `image_id`, as VQAv2 and TextVQA do.

    Tried are the names `ID`, `ID.jpg`, `ID.png`, COCO's twelve digits and `COCO_val2014_...`, beside the
    file and in `images`, `train_images` and the folder of the subset (`val2014`).

    Raises:
        UserError: there is no such file.
    """
    text = str(number)
    names = [text, f"{text}.jpg", f"{text}.png", f"{text}.jpeg"]
    part = subset if isinstance(subset, str) else ""
    if text.isdecimal() and len(text) <= 12:
        names += [f"{int(text):012d}.jpg"] + [f"COCO_{part}_{int(text):012d}.jpg"] * bool(part)
    for below in (part, ".", "images", "train_images", "train2014", "val2014", "test2015"):
        for name in names:
            path = folder / below / name
            if os.path.isfile(path):
                return path
    raise UserError(
        f"{where}: image_id {quoted(number)} names no picture below "
        f"{printable(shorten(folder, LONGEST_PATH))}; put {quoted(names[-1])[1:-1]} "
        "there, or give the line a field image with a path"
    )


def missing(path: Path, name: str) -> UserError:
    """The error for a file that is not there; a text that is too long for a path is not called one."""
    text = printable(shorten(path, LONGEST_PATH))
    if any(len(os.fsencode(part)) > 255 for part in path.parts if storable_name(part)):
        return UserError(f"{name} is neither a path nor a picture in base64: {printable(shorten(path.name))}")
    return UserError(f"{name} {text} does not exist")


def storable_name(part: str) -> bool:
    """Whether the file system can be asked for a name at all."""
    try:
        os.fsencode(part)
    except UnicodeEncodeError:
        return False
    return True


def _looks_encoded(text: str) -> bool:
    if len(text) < _SHORTEST_BASE64 or not _BASE64.fullmatch(text):
        return False
    try:
        head = base64.b64decode(
            "".join(text[:80].split())[:40], altchars=b"-_" if "_" in text or "-" in text else None
        )
    except binascii.Error:
        return False
    return head.startswith(_MAGIC)


def _decoded(text: str, name: str) -> bytes:
    plain = "".join(text.split()).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        raise UserError(f"{name} holds base64 text that is damaged ({error}); write it anew") from None


def _data_of_uri(uri: str, name: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise UserError(f"{name} is a data URI without a comma: {quoted(uri)}")
    if head.lower().endswith(";base64"):
        return _decoded(unquote(body), name)
    return unquote_to_bytes(body)
