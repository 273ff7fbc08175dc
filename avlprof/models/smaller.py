"""Prompts whose pictures hand the language model fewer vision tokens: pooled ones, or smaller pictures.

What `pictures` of a policy says: means of neighbouring features between the vision tower and the
language model (as Matryoshka models are trained for, arXiv 2405.17430, and as arXiv 2502.11501 found to
beat many selections), and the picture made smaller before the processor (arXiv 2510.07143, VTC-Bench).
Both give a picture of `rows x columns` tokens the same smaller grid, whose positions are those that the
model gives to any picture with such a grid.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from avlprof.errors import UserError
from avlprof.models.adapter import Adapter
from avlprof.models.load import LoadedModel
from avlprof.policy import Grid, PicturePolicy, PromptShape, smaller_grid
from avlprof.policy.parts import PictureKind
from avlprof.tasks import Sample
from avlprof.tasks.turn import Message

_SQUARE: Final = frozenset(("llava",))
_GRIDS: Final = frozenset(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
_DEEP: Final = frozenset(("qwen3_vl",))  # which adds features of the tower in several layers
FAMILIES: Final[Mapping[PictureKind, frozenset[str]]] = {
    "pooled": (_SQUARE | _GRIDS) - _DEEP,
    "resized": _GRIDS,
}
"""Families by `model_type` whose pictures can be made smaller in each way."""


def pooled(features: Tensor, grid: Grid, smaller: Grid) -> Tensor:
    """Means of the features `[rows * columns, D]` of one picture over the cells of a smaller grid.

    Cells are as even as whole tokens allow (those of `adaptive_avg_pool2d`); sums are in fp32.
    """
    square = features.float().view(1, *grid, -1).permute(0, 3, 1, 2)
    return adaptive_avg_pool2d(square, smaller)[0].flatten(1).T.to(features.dtype)


def check_kind(adapter: Adapter, kind: PictureKind) -> None:
    """`UserError` unless pictures of the adapter's family can be made smaller in this way."""
    if adapter.family in FAMILIES[kind]:
        return
    if kind == "resized":
        why = "gives every picture as many vision tokens, whatever its size, or cuts it into tiles"
        raise UserError(
            f"family '{adapter.family}' {why}; families with dynamic resolution are {_named(kind)}"
        )
    raise UserError(
        f"pooling is not known for family '{adapter.family}', whose pictures are no plain grid of features "
        f"that enter before the first layer; it is for {_named(kind)}"
    )


def picture_grids(
    adapter: Adapter, encoding: Mapping[str, Tensor], chats: Sequence[Sequence[Message]]
) -> list[list[Grid]]:
    """The grid of each picture of each row, in the order of the prompt.

    Raises:
        UserError: a row shows a video, or its vision tokens are not one plain grid a picture.
    """
    totals = adapter.vision_mask(encoding["input_ids"]).sum(dim=1).tolist()
    grids: list[list[Grid]] = []
    number = 0
    for chat, total in zip(chats, totals, strict=True):
        if any(message.videos for message in chat):
            raise UserError("pictures are made smaller one by one, and a prompt shows a video")
        own: list[Grid] = []
        for picture in (picture for message in chat for picture in message.images):
            layout = adapter.image_layout(encoding, number, picture.size)
            number += 1
            if layout is not None and len(layout.tiles) == 1:
                own.append((layout.tiles[0].rows, layout.tiles[0].columns))
        if sum(rows * columns for rows, columns in own) != total:
            raise UserError(f"vision tokens of '{adapter.family}' are not one plain grid a picture")
        grids.append(own)
    return grids


@dataclass(frozen=True)
class SmallerAdapter(Adapter):
    """An adapter whose prompts have `share` of each picture's vision tokens, at most; see `smaller_pictures`.

    `plain` encodes pictures as they are, `exact` (of `resized`) without resizing them again.
    """

    plain: Any = field(default=None, repr=False)
    exact: Any = field(default=None, repr=False)
    kind: PictureKind = "pooled"
    share: float = 1.0

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> dict[str, Tensor]:
        """As `Adapter.encode_chats`.

        Raises:
            UserError: also as `picture_grids`, or the processor makes another grid than it was asked for.
        """
        whole: dict[str, Tensor] = self.plain.encode_chats(chats)
        grids = picture_grids(self.plain, whole, chats)
        wanted = [[smaller_grid(*grid, self.share) for grid in row] for row in grids]
        if self.kind == "pooled":
            vision = self.plain.vision_mask(whole["input_ids"])
            pad = getattr(self.processor.tokenizer, "pad_token_id", None) or 0
            return _without(whole, _kept(vision, grids, wanted), pad)
        vision_config = self.model.config.vision_config
        side = int(vision_config.patch_size) * int(vision_config.spatial_merge_size)
        resample = getattr(self.processor.image_processor, "resample", None)
        shrunk = [_resized(chat, row, side, resample) for chat, row in zip(chats, wanted, strict=True)]
        # without what a family says of pictures that its model does not know: these are such on purpose
        encoding = Adapter.encode_chats(self.exact, shrunk)
        if picture_grids(self.exact, encoding, shrunk) != wanted:
            raise UserError(
                f"the image processor of '{self.family}' does not take pictures of {side} pixels a token as "
                "they are, so they cannot be made smaller by the token"
            )
        return encoding


@dataclass(frozen=True)
class SamplePictures:
    """The pictures of samples as a model's prompts show them."""

    adapter: Adapter
    samples: Sequence[Sample]

    @functools.cached_property
    def grids(self) -> list[list[Grid]]:
        """The grid of vision tokens of each picture of each sample; every picture is opened for it.

        Raises:
            UserError: as `picture_grids`.
        """
        grids: list[list[Grid]] = []
        for sample in self.samples:
            chat = sample.messages()
            grids += picture_grids(self.adapter, self.adapter.encode_chats([chat]), [chat])
        return grids

    def on(self, prompts: Sequence[PromptShape], *kinds: PictureKind) -> list[PromptShape]:
        """The samples' prompts, in their order, with the grids of their pictures.

        Raises:
            UserError: as `picture_grids`, or pictures cannot be made smaller in one of these ways.
        """
        for kind in kinds:
            check_kind(self.adapter, kind)
        own = zip(prompts, self.grids, strict=True)
        return [replace(prompt, grids=tuple(grids)) for prompt, grids in own]


@contextlib.contextmanager
def smaller_pictures(loaded: LoadedModel, pictures: PicturePolicy | None) -> Iterator[LoadedModel]:
    """The model as one whose pictures hand the language model at most a share of their vision tokens.

    What is yielded encodes samples so, and notes it among its settings, so that answers of it are not
    taken for those of `loaded`. Pooling changes two methods of the model within the context, for this
    thread alone. None, and a share of 1, is the model as it is.

        with smaller_pictures(loaded, policy.pictures) as smaller, apply(smaller.model, policy.of_cache):
            smaller.model.generate(**smaller.adapter.encode_samples(samples))

    Raises:
        UserError: as `check_kind`.
    """
    if pictures is None or pictures.share >= 1.0:
        yield loaded
        return
    kind, share = pictures.kind, pictures.share
    check_kind(loaded.adapter, kind)
    adapter, exact = loaded.adapter, None
    if kind == "resized":
        processor = copy.copy(adapter.processor)
        processor.image_processor = copy.copy(processor.image_processor)
        processor.image_processor.do_resize = False
        exact = replace(adapter, processor=processor)
    smaller = SmallerAdapter(adapter.model, adapter.processor, adapter, exact, kind, share)
    noted = {**loaded.arguments, "pictures": f"{kind} to {share!r} of their vision tokens"}
    with _pooling(adapter, share) if kind == "pooled" else contextlib.nullcontext():
        yield replace(loaded, adapter=smaller, arguments=noted)


@contextlib.contextmanager
def _pooling(adapter: Adapter, share: float) -> Iterator[None]:
    """The model hands on means of features, and gives positions as to pictures with the smaller grids."""
    inner: Any = adapter.model.model
    features: Any = inner.get_image_features
    positions: Any = getattr(inner, "get_rope_index", None)
    owner = threading.get_ident()

    @functools.wraps(features)  # generation looks at its arguments
    def of_pictures(*args: Any, **kwargs: Any) -> Any:
        output = features(*args, **kwargs)
        if threading.get_ident() != owner:
            return output
        parts = output.pooler_output if hasattr(output, "pooler_output") else output
        sizes = _grids(adapter, _argument(features, "image_grid_thw", args, kwargs), len(parts))
        fewer = [
            pooled(part, grid, smaller_grid(*grid, share)) for part, grid in zip(parts, sizes, strict=True)
        ]
        if parts is output:
            return fewer
        output.pooler_output = fewer
        return output

    def of_positions(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(positions).bind(*args, **kwargs)
        grids = bound.arguments.get("image_grid_thw")
        if threading.get_ident() == owner and grids is not None:
            bound.arguments["image_grid_thw"] = _smaller_thw(adapter, grids, share)
        return positions(*bound.args, **bound.kwargs)

    changed: dict[str, Callable[..., Any]] = {"get_image_features": of_pictures}
    if callable(positions):
        changed["get_rope_index"] = of_positions
    before = {name: inner.__dict__[name] for name in changed if name in inner.__dict__}
    inner.__dict__.update(changed)
    try:
        yield
    finally:
        for name in changed:
            if name in before:
                inner.__dict__[name] = before[name]
            else:
                del inner.__dict__[name]


def _argument(function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    return inspect.signature(function).bind(*args, **kwargs).arguments.get(name)


def _grids(adapter: Adapter, thw: Tensor | None, pictures: int) -> list[Grid]:
    """The grids of a call's pictures, by their sizes in patches or, where all are alike, by the config."""
    encoding = {} if thw is None else {"image_grid_thw": thw}
    layouts = [adapter.image_layout(encoding, number) for number in range(pictures)]
    return [(layout.tiles[0].rows, layout.tiles[0].columns) for layout in layouts if layout is not None]


def _smaller_thw(adapter: Adapter, thw: Tensor, share: float) -> Tensor:
    """Sizes in patches `[pictures, 3]` of the pictures that would have the smaller grids."""
    merge = int(adapter.model.config.vision_config.spatial_merge_size)
    wanted = [smaller_grid(*grid, share) for grid in _grids(adapter, thw, len(thw))]
    sizes = [[1, rows * merge, columns * merge] for rows, columns in wanted]
    return torch.tensor(sizes, dtype=thw.dtype, device=thw.device)


def _kept(vision: Tensor, grids: list[list[Grid]], wanted: list[list[Grid]]) -> Tensor:
    """Which tokens of a prompt stay, bool `[B, N]`: of each picture as many as its smaller grid has."""
    keep = ~vision
    for row, (whole, smaller) in enumerate(zip(grids, wanted, strict=True)):
        columns = vision[row].nonzero()[:, 0]
        start = 0
        for (rows, width), (height, fewer) in zip(whole, smaller, strict=True):
            keep[row, columns[start : start + height * fewer]] = True
            start += rows * width
    return keep


def _without(encoding: Mapping[str, Tensor], keep: Tensor, pad: int) -> dict[str, Tensor]:
    """The batch with the tokens that stay alone, padded on the left anew; pictures stay whole."""
    shape = encoding["input_ids"].shape
    real = encoding["attention_mask"].bool() & keep
    longest = int(real.sum(dim=1).max())
    shorter = dict(encoding)
    for name, value in encoding.items():
        if value.shape == shape and not value.is_floating_point():
            rows = [own[mask] for own, mask in zip(value, real, strict=True)]
            fill = pad if name == "input_ids" else 0
            shorter[name] = torch.stack(
                [torch.cat([row.new_full((longest - len(row),), fill), row]) for row in rows]
            )
    return shorter


def _resized(chat: Sequence[Message], wanted: list[Grid], side: int, resample: Any) -> list[Message]:
    """A conversation whose pictures have `side` pixels a token of their smaller grids."""
    left = iter(wanted)
    method = Image.Resampling(int(resample)) if resample is not None else Image.Resampling.BICUBIC

    def shrunk(picture: Image.Image) -> Image.Image:
        rows, columns = next(left)
        return picture.resize((columns * side, rows * side), method)

    return [replace(message, images=tuple(map(shrunk, message.images))) for message in chat]


def _named(kind: PictureKind) -> str:
    return ", ".join(sorted(FAMILIES[kind]))
