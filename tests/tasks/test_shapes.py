"""Drawn pictures: frames of any size, what labels say of their pixels, and the task of many sizes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from avlprof.tasks import load_task
from avlprof.tasks.shapes.scene import (
    COLORS,
    PATCH_SIZE,
    Frame,
    is_drawn,
    patch_labels,
    render,
    sample_scene,
    sampled_frame,
)

FRAMES = [
    Frame(),
    Frame(88, 168),
    Frame(168, 88),
    Frame(104, 96),
    Frame(80, 80, 80 / 112),
    Frame(152, 152, 152 / 112),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f"{f.width}x{f.height}x{f.zoom:.2f}")
def test_items_stand_in_their_thirds_of_any_frame(frame):
    """The pixels of one item alone: inside its third, up to a pixel and what is larger than a third."""
    for number in range(30):
        scene = sample_scene((8, number), (1, 1), frame=frame)
        (item,) = scene.items
        pixels = np.asarray(render(scene)).astype(int)
        assert pixels.shape == (frame.height, frame.width, 3)
        ink = np.argwhere(np.abs(pixels - pixels[0, 0]).sum(axis=2) > 30)  # and the ground is in the corner
        darkest = pixels[tuple(ink[pixels[tuple(ink.T)].sum(axis=1).argmin()])]
        assert np.abs(darkest - COLORS[item.color]).max() < 60
        for axis, (third, length) in enumerate(
            ((item.cell // 3, frame.height), (item.cell % 3, frame.width))
        ):
            size = ink[:, axis].max() + 1 - ink[:, axis].min()
            spare = max(size - length / 3, 0) + 4
            assert ink[:, axis].min() >= third * length / 3 - spare
            assert ink[:, axis].max() + 1 <= (third + 1) * length / 3 + spare


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f"{f.width}x{f.height}x{f.zoom:.2f}")
def test_a_label_names_what_its_patch_shows(frame):
    """A patch with 8 or more pixels of one pure ink has that colour; a patch without any has no label."""
    inks = np.array(list(COLORS.values()))
    right: list[bool] = []
    for number in range(12):
        picture, labels = patch_labels(sample_scene((9, number), frame=frame))
        rows, columns = frame.height // PATCH_SIZE, frame.width // PATCH_SIZE
        pixels = np.asarray(picture).reshape(rows, PATCH_SIZE, columns, PATCH_SIZE, 3).swapaxes(1, 2)
        pixels = pixels.reshape(rows * columns, -1, 1, 3)
        pure = (pixels == inks).all(axis=3).sum(axis=1)  # [patches, colours]
        clear = (pure >= 8).sum(axis=1) == 1
        right += (labels[clear, 1] == pure[clear].argmax(axis=1) + 1).tolist()
        ground = (pixels[:, :, 0] == np.asarray(picture)[0, 0]).all(axis=2).all(axis=1)
        assert not labels[ground].any()
    assert len(right) > 20 and np.mean(right) > 0.98  # items may overlap


def test_a_frame_changes_no_item():
    for number in range(20):
        plain, framed = (sample_scene((0, 3, number), frame=frame) for frame in (None, Frame(160, 96)))
        assert plain.items == framed.items


def test_the_task_of_many_sizes_asks_the_same_in_other_frames():
    plain = load_task("shapes:describe,count").samples("held-out", 30)
    sized = load_task("shapes-sizes:describe,count").samples("held-out", 30)
    asked = [[(s.id, s.prompt, s.answers) for s in samples] for samples in (plain, sized)]
    assert asked[0] == asked[1]
    pictures = [sample.open_images()[0] for sample in sized]
    sides = np.array([picture.size for picture in pictures])
    assert sides.min() >= 88 and sides.max() <= 168 and (sides % PATCH_SIZE == 0).all()
    assert len({picture.size for picture in pictures}) > 15
    assert all(is_drawn(picture) for picture in pictures)
    assert sampled_frame((0, 3, 4)) == sampled_frame((0, 3, 4))
    with pytest.raises(Exception, match="question type of task 'shapes-sizes'"):
        load_task("shapes-sizes:nothing")


def test_what_is_drawn_is_told_by_its_colours():
    """As by a table of all pixels' colours, on drawn pictures, greys, noise and drawings with little ink."""
    rng = np.random.default_rng(0)
    drawn = [render(sample_scene((9, number))) for number in range(4)]
    flat = [Image.new("RGB", (40, 30), (tone, tone, tone)) for tone in (0, 230, 255)]
    noise = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))]
    sparse = np.full((30, 30, 3), 240, dtype=np.uint8)
    sparse[0, :20] = rng.integers(0, 200, (20, 3))
    for picture in [*drawn, *flat, *noise, Image.fromarray(sparse)]:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        colors, counts = np.unique(pixels, axis=0, return_counts=True)
        tone, inks = colors[counts.argmax()], np.array(list(COLORS.values()))
        pure = counts[(colors[:, None] == inks).all(axis=2).any(axis=1)].sum()
        flat_ground = tone.min() >= 232 and not np.ptp(tone) and counts.max() >= 0.7 * len(pixels)
        assert is_drawn(picture) == (flat_ground and pure >= 0.1 * (len(pixels) - counts.max()))
    assert all(map(is_drawn, drawn))
