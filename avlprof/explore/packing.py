"""Maps of attention as text that a page unpacks when it shows them.

A map is what one row gave the vision tokens in one layer. It is stored as its largest value and, for
each token, the square root of the value over it in 47 steps: fine where there is little, and a
thousandth of the peak is told from nothing. All maps of a sample are deflated together.
"""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

LEVELS = 47
"""Steps above nothing. More would be invisible on a colour scale, and each doubling costs a bit."""
LONGEST_SIDE = 768
"""Pixels of a picture's longer side in a page."""
PHOTO = {"format": "JPEG", "quality": 82, "optimize": True}
DRAWING = {"format": "PNG", "optimize": True}


def pack_maps(values: ArrayLike) -> dict[str, Any]:
    """Maps `[..., vision]`, 0 or more: shape, peaks `[...]` fp32 and levels uint8, both as text."""
    maps = np.nan_to_num(np.asarray(values, dtype=np.float32), nan=0.0, posinf=0.0).clip(min=0.0)
    peaks = maps.max(axis=-1, initial=0.0)
    relative = maps / np.where(peaks > 0, peaks, 1.0)[..., None]
    levels = np.rint(LEVELS * np.sqrt(relative)).astype(np.uint8)
    return {"shape": list(maps.shape), "peaks": as_text(peaks.astype("<f4")), "levels": as_text(levels)}


def unpack_maps(packed: dict[str, Any]) -> NDArray[np.float32]:
    """The maps as a page shows them: within `1 / 94` of the peak's in square roots."""
    shape = packed["shape"]
    peaks = np.frombuffer(_inflated(packed["peaks"]), dtype="<f4").reshape(shape[:-1])
    levels = np.frombuffer(_inflated(packed["levels"]), dtype=np.uint8).reshape(shape)
    maps: NDArray[np.float32] = (levels / LEVELS).astype(np.float32) ** 2 * peaks[..., None]
    return maps


def as_text(array: NDArray[Any]) -> str:
    """The bytes of an array, deflated (zlib), in base64; of noise, repeated strings are not looked for."""
    plain, written = np.ascontiguousarray(array).tobytes(), []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        packer = zlib.compressobj(6, strategy=strategy)
        written.append(packer.compress(plain) + packer.flush())
    return base64.b64encode(min(written, key=len)).decode()


def picture_uri(picture: Image.Image) -> str:
    """A picture as a data URI, no larger than a screen shows it: PNG or JPEG, whichever is shorter."""
    small = picture.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    written = []
    for how in (DRAWING, PHOTO):
        buffer = io.BytesIO()
        small.save(buffer, **how)  # type: ignore[arg-type]
        written.append((len(buffer.getvalue()), str(how["format"]).lower(), buffer.getvalue()))
    _, kind, data = min(written)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _inflated(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
