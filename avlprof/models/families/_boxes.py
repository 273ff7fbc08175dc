"""Which part of a picture an image processor shows to the model."""

from __future__ import annotations

from typing import Any

from avlprof.models.tiles import WHOLE, Box


def shown_box(image_processor: Any, size: tuple[int, int] | None) -> Box:
    """The box that a processor of one square a picture keeps of a picture of this (width, height).

    Processors of CLIP's kind shrink the shorter edge and cut a square out of the middle, or first
    pad the picture to a square; others squeeze it. The whole picture without processor or size.
    """
    if image_processor is None or size is None:
        return WHOLE
    if getattr(image_processor, "do_pad", False):
        return padded_box(size)
    crop = _sides(getattr(image_processor, "crop_size", None))
    if not getattr(image_processor, "do_center_crop", False) or crop is None:
        return WHOLE
    width, height = _resized(image_processor, size)
    left, top = (width - crop[0]) / 2 / width, (height - crop[1]) / 2 / height
    return left, top, 1 - left, 1 - top


def padded_box(size: tuple[int, int]) -> Box:
    """The square around a picture of this (width, height), which stands in its middle."""
    width, height = size
    side = max(size)
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    return left, top, 1 - left, 1 - top


def _resized(image_processor: Any, size: tuple[int, int]) -> tuple[float, float]:
    stated = getattr(image_processor, "size", None)
    shortest = getattr(stated, "shortest_edge", None)
    if not getattr(image_processor, "do_resize", False):
        return size
    if shortest is None:
        return _sides(stated) or size
    width, height = size
    scale = float(shortest) / min(size)
    return width * scale, height * scale


def _sides(stated: Any) -> tuple[float, float] | None:
    """Width and height of a size that has both."""
    height, width = getattr(stated, "height", None), getattr(stated, "width", None)
    return None if height is None or width is None else (float(width), float(height))
