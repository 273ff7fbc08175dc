"""Where vision tokens lie in a picture, proved by bright spots in real pictures.

Each family's own image processor cuts a picture, and a small random model of the family, in whose
vision tower no patch attends to another, makes features of it. Tokens that change when a spot
of the picture changes must be those whose place, as the layout has it, is at the spot.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from avlprof.errors import UserError
from avlprof.models import adapter_for
from avlprof.models.tiles import Tile, dump_tiles, paint, parse_tiles, resolution
from avlprof.tasks import Message
from avlprof.testing.families import families
from avlprof.testing.models import IMAGE, cases
from tests.helpers import few
from tests.spots import areas, flat, silence_tower, spotted

BUILDERS = {**dict(cases()), **dict(families())}
NEAREST = 0

CLIP = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
TILE = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
FINE = [[12, 24], [24, 12], [24, 24], [12, 36], [60, 60]]
SQUARE = {"size": {"height": 32, "width": 32}}
CUTS = {"crop_to_patches": True, "min_patches": 1, "max_patches": 6}
FLAT = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 4096}}
IDEFICS = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 24}}

# builder, image processor, its options, (width, height) of pictures, reach of a token beyond its place
SEEN = {
    "llava": ("llava-4q2kv", "CLIPImageProcessorPil", CLIP, [(60, 60), (90, 60), (60, 140)], 0.5),
    "llava padded": ("llava-4q2kv", "LlavaImageProcessorPil", CLIP | {"do_pad": True}, [(60, 90)], 0.5),
    "vipllava": ("vipllava", "CLIPImageProcessorPil", CLIP, [(80, 60), (60, 61)], 0.5),
    "llava_next": (
        "llava_next", "LlavaNextImageProcessorPil", TILE, [(90, 50), (48, 90), (61, 60)], 0.5
    ),
    "llava_onevision": (
        "llava_onevision", "LlavaOnevisionImageProcessorPil", TILE, [(90, 50), (48, 90)], 0.5
    ),
    "llava_onevision shrunk": (
        "llava_onevision", "LlavaOnevisionImageProcessorPil", TILE, [(120, 120), (200, 150)], 1.3
    ),
    "qwen2_5_vl": ("qwen2_5_vl-6q2kv", "Qwen2VLImageProcessorPil", FLAT, [(64, 40), (50, 90)], 0.5),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLImageProcessorPil", FLAT, [(64, 40), (50, 90)], 0.5),
    "qwen3_vl": ("qwen3_vl", "Qwen2VLImageProcessorPil", FLAT, [(64, 40), (50, 90)], 0.5),
    "glm4v": ("glm4v", "Glm4vImageProcessorPil", FLAT, [(64, 40), (50, 90)], 0.5),
    "internvl": (
        "internvl", "GotOcr2ImageProcessorPil", CUTS | {"size": {"height": 24, "width": 24}},
        [(90, 60), (50, 110), (60, 60), (200, 40)], 0.5,
    ),
    "aya_vision": (
        "aya_vision", "GotOcr2ImageProcessorPil", CUTS | SQUARE, [(90, 60), (50, 110), (60, 60)], 0.5
    ),
    "idefics3": ("idefics3", "Idefics3ImageProcessorPil", IDEFICS, [(96, 60), (50, 110)], 0.5),
    "smolvlm": ("smolvlm", "SmolVLMImageProcessorPil", IDEFICS, [(96, 60), (50, 110)], 0.5),
    "idefics3 whole": (
        "idefics3", "Idefics3ImageProcessorPil", IDEFICS | {"do_image_splitting": False}, [(96, 60)], 0.5
    ),
    "mistral3": (
        "mistral3", "PixtralImageProcessorPil",
        {"patch_size": {"height": 8, "width": 8}, "size": {"longest_edge": 64}}, [(64, 40), (33, 64)], 0.5,
    ),
    "gemma3": ("gemma3", "Gemma3ImageProcessorPil", SQUARE, [(64, 40), (50, 90)], 0.5),
    "paligemma": (
        "paligemma", "SiglipImageProcessorPil", {"size": {"height": 20, "width": 20}}, [(64, 40)], 0.5
    ),
}  # fmt: skip


@cache
def built(name):
    """The model, its attention in the vision tower silenced."""
    case = BUILDERS[name]()
    if name.startswith("llava_"):
        case.model.config.image_grid_pinpoints = FINE
    silence_tower(case.model)
    return case


def processor_of(name):
    _, kind, options, _, _ = SEEN[name]
    try:
        cutter = getattr(hf, kind)(**options, **pinpoints(name), resample=NEAREST)
    except ImportError:
        pytest.skip(f"transformers {hf.__version__} has no {kind} without torchvision")
    return SimpleNamespace(image_processor=cutter)


def pinpoints(name):
    return {"image_grid_pinpoints": FINE} if name.startswith("llava_") else {}


@torch.no_grad()
def features(case, pixels):
    """`[vision tokens, width]` of all pictures, one after the other."""
    wanted = ("image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
    extra = {name: pixels[name] for name in wanted if name in pixels}
    if "image_sizes" in extra:
        extra["image_sizes"] = torch.as_tensor(extra["image_sizes"])
    found = case.model.get_image_features(pixels["pixel_values"], **extra, return_dict=True).pooler_output
    return torch.cat([part.flatten(0, -2) for part in found])


def encoding(processor, pictures):
    """What the family's processor would give, text left out."""
    nested = "batch_num_images" in processor.image_processor.model_input_names
    nested |= "Idefics" in type(processor.image_processor).__name__
    nested |= "SmolVLM" in type(processor.image_processor).__name__
    return dict(processor.image_processor(images=[pictures] if nested else pictures, return_tensors="pt"))


def check_spots(case, processor, adapter, size, others, reach, draws):
    """Spots in the last of some pictures light up the tokens that lie there, and no others."""
    plain = flat(size)
    before = encoding(processor, [*others, plain])
    base = features(case, before)
    layouts = [
        adapter.image_layout(before, index, picture.size) for index, picture in enumerate([*others, plain])
    ]
    assert sum(layout.tokens for layout in layouts) == len(base)
    offset = len(base) - layouts[-1].tokens
    lit = hidden = 0
    for _ in range(12):
        half = draws.uniform(0.15, 0.4, 2) * size
        middle = draws.uniform(0, 1, 2) * size
        low, high = (np.clip(edge, 0, size).round().astype(int) for edge in (middle - half, middle + half))
        if (high - low).min() < 8:
            continue
        spot = spotted(size, (*low, *high))
        moved = (features(case, encoding(processor, [*others, spot])) - base).abs().amax(dim=-1) > 1e-4
        assert not moved[:offset].any()
        box = (low[0] / size[0], low[1] / size[1], high[0] / size[0], high[1] / size[1])
        patches = set()
        for tile in layouts[-1].tiles:
            wide = reach * (tile.box[2] - tile.box[0]) / tile.columns
            tall = reach * (tile.box[3] - tile.box[1]) / tile.rows
            for index, (left, top, right, bottom) in areas(tile):
                patches.add(index)
                along = min(right, box[2]) - max(left, box[0])
                down = min(bottom, box[3]) - max(top, box[1])
                inside = along > 0.5 * (right - left) and down > 0.5 * (bottom - top)
                apart = (
                    left > box[2] + wide
                    or right < box[0] - wide
                    or top > box[3] + tall
                    or bottom < box[1] - tall
                )
                if inside:
                    lit += 1
                    assert moved[offset + index], (size, box, tile, index)
                if apart:
                    hidden += 1
                    assert not moved[offset + index], (size, box, tile, index)
        newlines = set(range(layouts[-1].tokens)) - patches
        assert not any(moved[offset + index] for index in newlines)
    return lit, hidden


@pytest.mark.parametrize("name", few(SEEN, ("llava", "llava_next", "qwen2_5_vl", "idefics3")))
def test_bright_spots_light_up_the_tokens_that_lie_there(name):
    built_as, _, _, sizes, reach = SEEN[name]
    case, processor = built(built_as), processor_of(name)
    adapter = adapter_for(case.model, processor)
    draws = np.random.default_rng(3)
    lit = hidden = 0
    for size in sizes:
        found = check_spots(case, processor, adapter, size, [], reach, draws)
        lit, hidden = lit + found[0], hidden + found[1]
    assert lit > 5
    assert hidden > 20


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "idefics3", "qwen2_vl"])
def test_a_picture_behind_another_has_its_own_tokens(name):
    built_as, _, _, sizes, reach = SEEN[name]
    case, processor = built(built_as), processor_of(name)
    adapter = adapter_for(case.model, processor)
    other = spotted((70, 50), (3, 4, 20, 30))
    lit, hidden = check_spots(case, processor, adapter, sizes[0], [other], reach, np.random.default_rng(4))
    assert lit > 2
    assert hidden > 10


@pytest.mark.parametrize(("size", "rows", "columns"), [((60, 56), 15, 15), ((50, 60), 15, 13)])
def test_padding_of_half_a_token_is_where_the_layout_has_it(size, rows, columns):
    """A picture that is not resized: a spot as large as a token's place lights up that token alone."""
    case, processor = built("llava_next"), processor_of("llava_next")
    plain = encoding(processor, [flat(size)])
    fine = adapter_for(case.model, processor).image_layout(plain, 0, size).tiles[1]
    assert (fine.rows, fine.columns) == (rows, columns)
    base = features(case, plain)
    spots = list(areas(fine))
    for index, box in spots[:columns] + spots[columns :: columns + 1]:
        edges = np.array(box) * (*size, *size)
        np.testing.assert_allclose(edges, edges.round(), atol=1e-6)
        spot = spotted(size, np.clip(edges.round().astype(int), 0, (*size, *size)))
        moved = (features(case, encoding(processor, [spot])) - base).abs().amax(dim=-1) > 1e-4
        assert (moved.nonzero()[:, 0][moved.nonzero()[:, 0] >= fine.first]).tolist() == [index]


def drawn_tiles(draws, count, beyond=0.3):
    """Tiles of any shape over any box, some of which reach beyond the picture."""
    found, first = [], 0
    for _ in range(count):
        rows, columns = (int(n) for n in draws.integers(1, 6, 2))
        stride = columns + int(draws.integers(0, 2))
        low, high = draws.uniform(-beyond, 0.45, 2), draws.uniform(0.55, 1 + beyond, 2)
        found.append(Tile(first, rows, columns, stride, (low[0], low[1], high[0], high[1])))
        first += rows * stride
    return found, first


@pytest.mark.parametrize("seed", range(6))
def test_painting_is_what_points_thrown_into_each_place_say(seed):
    """Many points a token, evenly over the part of its place that is in the picture."""
    draws = np.random.default_rng(seed)
    tiles, tokens = drawn_tiles(draws, 3, beyond=0.1)
    scores = draws.random(tokens)
    rows, columns = (int(n) for n in draws.integers(2, 9, 2))
    wanted = np.zeros((rows, columns))
    for tile in tiles:
        for index, (left, top, right, bottom) in areas(tile):
            across = np.linspace(left, right, 801)[:-1] + (right - left) / 1600
            down = np.linspace(top, bottom, 801)[:-1] + (bottom - top) / 1600
            across, down = (points[(points > 0) & (points < 1)] for points in (across, down))
            share = np.outer(
                np.bincount((down * rows).astype(int), minlength=rows) / len(down),
                np.bincount((across * columns).astype(int), minlength=columns) / len(across),
            )
            wanted += scores[index] * share
    np.testing.assert_allclose(paint(tiles, scores, rows, columns), wanted, atol=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_painting_loses_nothing(seed):
    draws = np.random.default_rng(100 + seed)
    tiles, tokens = drawn_tiles(draws, int(draws.integers(1, 5)))
    scores = draws.random(tokens)
    patches = np.concatenate([tile.tokens().ravel() for tile in tiles])
    for size in ((1, 1), (3, 7), resolution(tiles)):
        painted = paint(tiles, scores, *size)
        assert painted.shape == size
        assert (painted >= 0).all()
        assert painted.sum() == pytest.approx(scores[patches].sum())


def test_one_grid_is_painted_as_it_is():
    scores = np.random.default_rng(1).random(35)
    tile = Tile(0, 5, 7, 7)
    assert resolution([tile]) == (5, 7)
    np.testing.assert_allclose(paint([tile], scores, 5, 7), scores.reshape(5, 7))


def test_tiles_are_read_as_they_were_written():
    tiles, _ = drawn_tiles(np.random.default_rng(2), 4)
    found = parse_tiles(dump_tiles([tiles[:3], [], tiles[3:]]))
    assert [len(own) for own in found] == [3, 0, 1]
    for ours, theirs in zip((tile for own in found for tile in own), tiles, strict=True):
        assert (ours.first, ours.rows, ours.columns, ours.stride) == (
            theirs.first,
            theirs.rows,
            theirs.columns,
            theirs.stride,
        )
        np.testing.assert_allclose(ours.box, theirs.box, atol=1e-6)
    assert parse_tiles(dump_tiles(())) == ()
    for bad in ("", "3", "[[[1,2]]]", '[[[0,1,1,1,"a",0,1,1]]]'):
        with pytest.raises(UserError, match="eight numbers a tile"):
            parse_tiles(bad)


def test_rows_count_their_own_tokens_and_wrong_sums_have_no_layout():
    """Two rows of several pictures and videos; then a row that has a token more than they say."""
    case = BUILDERS["qwen2_vl"]()
    inputs = case.inputs(2, seed=3, pad=True, images_per_row=[2, 1], videos_per_row=[1, 1])
    still = Image.new("RGB", (8, 8))
    chats = [
        [Message("user", "", (still, still), ((still,) * 4,))],
        [Message("user", "", (still,)), Message("assistant", ""), Message("user", "", (), ((still,) * 5,))],
    ]
    adapter = adapter_for(case.model)
    first, second = adapter.vision_layout(inputs, chats)
    totals = adapter.vision_mask(inputs["input_ids"]).sum(dim=1).tolist()
    assert [len(own) for own in first] == [1, 1, 1, 0, 1, 0]
    assert [len(own) for own in second] == [1, 1, 0, 1, 0, 1]
    for row, total in zip((first, second), totals, strict=True):
        tokens = [int(token) for own in row for tile in own for token in tile.tokens().ravel()]
        assert sorted(tokens) == list(range(total))
    inputs["input_ids"][0, -1] = IMAGE
    assert adapter.vision_layout(inputs, chats) == [(), second]
