"""Random pixels in the forms that vision towers take, with the vision tokens of each picture.

Each function returns a `Pixels`: of a number of pictures, a generator, and whether pictures may
differ in size, it makes the token counts and the tensors, `pixel_values` fp32 among them. Those of
videos return a `Videos`: the prompt's ids of each video, and the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.testing.models import FIRST_WORD, IMAGE, VIDEO, Pixels, Videos

Made = tuple[list[int], dict[str, Tensor]]
GRID = (5, 4)  # rows and columns of vision tokens of a picture of any size; uneven ones have up to 2 more


def squares(side: int, tokens: int, most: int = 1, nested: bool = False) -> Pixels:
    """Squares of `side` x `side` pixels and `tokens` vision tokens; uneven pictures have 1 or `most`.

    With `nested` the pixels are one row of squares, as the Idefics families take them.
    """

    def pixels(images: int, generator: torch.Generator, uneven: bool) -> Made:
        counts = torch.ones(images, dtype=torch.long)
        if uneven:
            counts += (most - 1) * torch.randint(0, 2, (images,), generator=generator)
        values = torch.randn(int(counts.sum()), 3, side, side, generator=generator)
        return (counts * tokens).tolist(), {"pixel_values": values[None] if nested else values}

    return pixels


def tiles(tile: int, patch: int) -> Pixels:
    """Pictures of two tiles, side by side or (some of the uneven) one above the other.

    A picture's tokens are the overview's, then the rows over both tiles, a newline token behind
    each row.
    """
    cells = tile // patch

    def pixels(images: int, generator: torch.Generator, uneven: bool) -> Made:
        tall = torch.randint(0, 2, (images,), generator=generator) if uneven else torch.zeros(images)
        shapes = [(2, 1) if high else (1, 2) for high in tall.tolist()]
        values = torch.randn(images, 3, 3, tile, tile, generator=generator)
        counts = [cells**2 + rows * cells * (columns * cells + 1) for rows, columns in shapes]
        return counts, {"pixel_values": values, "image_sizes": torch.tensor(shapes) * tile}

    return pixels


def any_size(pixels_per_token: int) -> Pixels:
    """Pictures of any size, padded to the largest, with their `image_sizes` (Pixtral)."""

    def pixels(images: int, generator: torch.Generator, uneven: bool) -> Made:
        cells = _cells(images, generator, uneven)
        sizes = cells * pixels_per_token
        height, width = sizes.amax(dim=0).tolist()
        values = torch.randn(images, 3, height, width, generator=generator)
        return cells.prod(dim=1).tolist(), {"pixel_values": values, "image_sizes": sizes}

    return pixels


def flat_patches(patch: int, merge: int, frames: int) -> Pixels:
    """Pictures of any size as one list of flat patches, with their `image_grid_thw` (Qwen-VL)."""

    def pixels(images: int, generator: torch.Generator, uneven: bool) -> Made:
        cells = _cells(images, generator, uneven)
        grids = torch.cat([torch.ones(images, 1, dtype=torch.long), cells * merge], dim=1)
        values = torch.randn(int(grids.prod(dim=1).sum()), 3 * frames * patch**2, generator=generator)
        return cells.prod(dim=1).tolist(), {"pixel_values": values, "image_grid_thw": grids}

    return pixels


def flat_frames(patch: int, merge: int, together: int, *, between: bool, token: int = VIDEO) -> Videos:
    """Videos as one list of flat patches, with their `video_grid_thw`: the first has two times, the
    next three, and so on. With `between` a text token, in place of a timestamp, parts the times.
    """

    def videos(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        grids = torch.tensor([[2 + index, 2 * merge, 3 * merge] for index in range(count)])
        values = torch.randn(int(grids.prod(dim=1).sum()), 3 * together * patch**2, generator=generator)
        ids = []
        for times, rows, columns in grids.tolist():
            one = [token] * (rows * columns // merge**2)
            ids.append(([FIRST_WORD + 5] * between + one) * times)
        return ids, {"pixel_values_videos": values, "video_grid_thw": grids}

    return videos


def square_frames(side: int, tokens: int, frames: int = 3) -> Videos:
    """Videos of square frames, `tokens` vision tokens each, and a newline token behind the last."""

    def videos(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        values = torch.randn(count, frames, 3, side, side, generator=generator)
        return [[VIDEO] * (frames * tokens + 1)] * count, {"pixel_values_videos": values}

    return videos


def frames_as_pictures(side: int, tokens: int, frames: int = 3, nested: bool = False) -> Videos:
    """Videos whose frames stand in the prompt as pictures do, a text token before each.

    `nested` is as in `squares`.
    """

    def videos(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        values = torch.randn(count * frames, 3, side, side, generator=generator)
        ids = ([FIRST_WORD + 5] + [IMAGE] * tokens) * frames
        return [ids] * count, {"pixel_values": values[None] if nested else values}

    return videos


def _cells(images: int, generator: torch.Generator, uneven: bool) -> Tensor:
    cells = torch.tensor([GRID] * images)
    return cells + torch.randint(0, 3, cells.shape, generator=generator) if uneven else cells
