"""One way for every picture: from a file, from bytes, or from a Pillow image to upright RGB.

The result is what an image viewer shows: the orientation of EXIF is applied, transparent parts
lie on white, and 16 bits a channel become 8 by their upper byte. What has no one right answer is
refused: animations, several pages, numbers without a known scale. ICC profiles are *not* applied
(but for LAB, which has no RGB without), as in the loaders of transformers and datasets.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from avlprof.errors import UserError
from avlprof.tasks.text import printable, shorten

ImageSource = Path | Image.Image | Callable[[], Image.Image]
"""A file, a picture, or a function that draws or decodes one."""

PIXELS: Final = "AVLPROF_MAX_PIXELS"
ASPECT: Final = "AVLPROF_MAX_ASPECT"

_ONE_PICTURE = frozenset({"MPO", "PSD"})  # formats whose first frame is all that viewers show
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255, 255)
_INVERTED = 262  # TIFF tag whose value 0 says that 0 is white
_lock = threading.RLock()


@dataclass(frozen=True)
class PictureLimits:
    """The largest picture that is decoded: `pixels` in all, and long side over short side.

    `pixels` is 64 million by default (a 64-megapixel photograph); 200 is the aspect ratio from
    which the image processor of Qwen2-VL refuses pictures
    (https://github.com/QwenLM/Qwen2.5-VL, `smart_resize`).
    """

    pixels: int = 64_000_000
    aspect: float = 200.0

    @classmethod
    def from_environment(cls) -> PictureLimits:
        """The limits that `AVLPROF_MAX_PIXELS` and `AVLPROF_MAX_ASPECT` set, where they are set.

        Raises:
            UserError: a value that is no number of at least 1.
        """
        return cls(int(_number(PIXELS, cls.pixels)), _number(ASPECT, cls.aspect))

    def check(self, size: tuple[int, int], name: str) -> None:
        """Raises `UserError` for a width and height in pixels that are beyond the limits or 0."""
        width, height = size
        extent = f"{name} is {width:,} x {height:,} pixels"
        if min(size) < 1:
            raise UserError(f"{extent}, so it shows nothing; give another picture")
        if width * height > self.pixels:
            raise UserError(
                f"{extent}, more than {self.pixels:,} in all; make it smaller, or set {PIXELS} higher"
            )
        if max(size) > self.aspect * min(size):
            raise UserError(
                f"{extent}, one side more than {self.aspect:g} times the other; crop it or set {ASPECT}"
            )


def open_picture(source: ImageSource | bytes, name: str, limits: PictureLimits | None = None) -> Image.Image:
    """The picture as RGB, 8 bits a channel, as a viewer shows it; the same by every way in.

    Of a picture that Pillow opened already, the frame is taken that it stands at. The source is
    left as it is.

    Args:
        source: a file, its bytes, a picture, or a function that gives one.
        name: what the picture is called at the head of an error, such as `image cat.png`.
        limits: the largest picture to decode; by default `PictureLimits.from_environment()`.

    Raises:
        UserError: the file does not exist or cannot be decoded whole, is beyond the limits, has
            several frames or pages, or holds numbers whose scale is not known.
    """
    limits = limits or PictureLimits.from_environment()
    if callable(source):
        source = source()
    if isinstance(source, Image.Image):
        limits.check(source.size, name)
        with reading(name, limits.pixels):
            return _rgb(source, name)
    check_header(source, name, limits)
    with reading(name, limits.pixels), Image.open(_stream(source)) as image:
        image.load()
        return _rgb(image, name)


def check_header(source: Path | bytes, name: str, limits: PictureLimits | None = None) -> None:
    """Refuse by its header what `open_picture` would refuse, before anything is decoded.

    Raises:
        UserError: there is no file, no known format, more than one frame, or a size beyond the limits.
    """
    if isinstance(source, Path):
        _check_file(source, name)
    with reading(name, None), Image.open(_stream(source)) as image:
        (limits or PictureLimits.from_environment()).check(image.size, name)
        if image.format == "EPS":
            raise UserError(f"{name} is an EPS drawing, which is a program; save it as PNG")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format not in _ONE_PICTURE:
            raise UserError(
                f"{name} has {frames} frames or pages, of which a model would see one; save the one that "
                "is meant as a picture of its own, or give all as a video"
            )


@contextmanager
def reading(name: str, pixels: int | None) -> Iterator[None]:
    """Pillow with `pixels` for its own bomb check, without leniency for cut files; errors are sentences.

    None is no bomb check, for reading a header. Pillow lets through every kind of exception of its
    decoders, so every kind is turned into `UserError` here. Its settings are of the whole process:
    they are set under a lock and put back.
    """
    with _lock:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = pixels, False
        try:
            yield
        except UserError:
            raise
        except UnidentifiedImageError:
            raise UserError(
                f"{name} cannot be read: Pillow knows no picture of this kind; save it as PNG or JPEG"
            ) from None
        except Exception as error:
            reason = printable(shorten(error, 160)) or type(error).__name__
            raise UserError(f"{name} cannot be read: {reason}") from None
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _number(variable: str, usual: float) -> float:
    text = os.environ.get(variable, "").replace("_", "").strip()
    try:
        value = float(text) if text else float(usual)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise UserError(
            f"{variable} must be a number of at least 1, got '{shorten(text)}'; {usual:g} is usual"
        )
    return value


def _check_file(path: Path, name: str) -> None:
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder; give a picture, or several as images or as a video")
    kind = "is no regular file" if os.path.exists(path) else "does not exist"
    raise UserError(f"{name} {kind}")


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return source if isinstance(source, Path) else io.BytesIO(source)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_INVERTED) == 0
    upright = _upright(image)
    if upright.mode.startswith(("I", "F")):
        flat = _eight_bits(upright, name, inverted)
    elif upright.mode == "LAB":
        flat = _from_lab(upright, name)
    elif _is_transparent(upright):
        flat = _on_white(upright, name)
    else:
        flat = upright.convert("RGB")
    flat.info = {}  # an orientation in it would be applied again
    return flat


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # viewers show a picture whose EXIF is broken, lying as it is
        turn = None
    return image if turn is None else image.transpose(turn)


def _is_transparent(image: Image.Image) -> bool:
    palette = getattr(image, "palette", None)
    return (
        image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
        or "transparency" in image.info
        or (image.mode == "P" and palette is not None and palette.mode.endswith("A"))
    )


def _on_white(image: Image.Image, name: str) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        raise UserError(f"{name} marks a colour of 16 bits as transparent; save it with an alpha channel")
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")


def _eight_bits(image: Image.Image, name: str, inverted: bool) -> Image.Image:
    """Grey of 16 or 32 bits or of floats; 16 bits lose their lower byte, as Pillow does in colour."""
    values = np.asarray(image)
    whole = values.astype(np.float64)
    low, high = float(whole.min()), float(whole.max())
    key = image.info.get("transparency")
    deep = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    # from the narrowest range that holds all values: 0..1 of floats, 8 bits, 16 bits
    if image.mode == "F" and low >= 0 and high <= 1:
        whole = np.rint(whole * 255)
    elif not low >= 0 or not high <= 65535 or (image.mode == "F" and (whole % 1).any()):
        raise UserError(
            f"{name} holds numbers from {low:g} to {high:g} of mode {image.mode}, whose white is not known; "
            "scale them to 8 bits"
        )
    elif deep or high > 255:
        whole = whole // 256
    if inverted and deep:
        whole = 255 - whole
    if isinstance(key, int):
        whole[values == key] = 255
    return Image.fromarray(whole.astype(np.uint8)).convert("RGB")


def _from_lab(image: Image.Image, name: str) -> Image.Image:
    try:
        from PIL import ImageCms
    except ImportError:
        raise UserError(f"{name} is in LAB, for which this Pillow lacks littlecms; save it as RGB") from None
    lab, rgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
    turned = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    if turned is None:
        raise UserError(f"{name} is in LAB and cannot be turned into RGB; save it as RGB")
    return turned
