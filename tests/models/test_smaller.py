"""Pooled vision tokens and smaller pictures: the grids, the prompts, the features and their positions."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessor

from avlprof.errors import UserError
from avlprof.models import LoadedModel, adapter_for, load_model
from avlprof.models.families.tiny import PictureProcessor
from avlprof.models.smaller import FAMILIES, picture_grids, pooled, smaller_pictures
from avlprof.policy import PicturePolicy, smaller_grid
from avlprof.tasks import Message, load_task
from avlprof.testing.families import families
from avlprof.testing.models import cases
from tests.real_processors import FLAT, QWEN, REAL, SMALL, tokenizer

BUILDERS = {**dict(cases()), **dict(families())}


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.0, 1.0))
def test_a_smaller_grid_fits_and_is_as_even_as_any(rows: int, columns: int, share: float) -> None:
    height, width = smaller_grid(rows, columns, share)
    most = max(int(share * rows * columns + 1e-6), 1)
    assert 1 <= height <= rows
    assert 1 <= width <= columns
    assert height * width <= most
    fits = [(a, b) for a in range(1, rows + 1) for b in range(1, columns + 1) if a * b <= most]
    finest = max(min(a / rows, b / columns) for a, b in fits)
    assert min(height / rows, width / columns) == finest
    assert height * width == max(a * b for a, b in fits if min(a / rows, b / columns) == finest)


@pytest.mark.parametrize("grid", [(14, 14), (6, 8), (2, 20)])
def test_a_quarter_of_an_even_grid_is_two_by_two_means(grid) -> None:
    features = torch.randn(math.prod(grid), 5)
    half = smaller_grid(*grid, 0.25)
    assert half == (grid[0] // 2, grid[1] // 2)
    square = features.view(half[0], 2, half[1], 2, 5)
    torch.testing.assert_close(pooled(features, grid, half), square.mean(dim=(1, 3)).flatten(0, 1))


def cells(whole: int, parts: int) -> list[range]:
    """Which of `whole` places each of `parts` even cells covers, those that it covers in part too."""
    return [range(i * whole // parts, -(-(i + 1) * whole // parts)) for i in range(parts)]


def means(features: torch.Tensor, grid, smaller) -> torch.Tensor:
    square = features.view(*grid, -1)
    rows = [
        torch.stack([square[y, x] for y in down for x in along]).mean(dim=0)
        for down in cells(grid[0], smaller[0])
        for along in cells(grid[1], smaller[1])
    ]
    return torch.stack(rows)


def built(name: str) -> LoadedModel:
    if name.startswith("tiny"):
        return load_model(name, device="cpu", dtype="float32")
    real = REAL[name]
    model = BUILDERS[real.model]().model
    if name.startswith("qwen"):  # without the part for videos, which needs torchvision
        letters = tokenizer(real.named, real.fixed, real.others)
        processor = PictureProcessor(Qwen2VLImageProcessor(**FLAT, size=SMALL), letters, chat_template=QWEN)
    else:
        processor = real.processor()
    return LoadedModel(model, processor, name, name, "1", adapter_for(model, processor))


def picture(seed: int, size) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.inference_mode()
def last(loaded: LoadedModel, encoding) -> torch.Tensor:
    return loaded.model(**encoding).logits[:, -1]


CHATS = [
    [Message("user", "count?", (picture(0, (96, 120)),))],
    [Message("user", "and here?", (picture(1, (112, 96)), picture(2, (96, 96))))],
]
POOLS = [
    "tiny",
    pytest.param("tiny-mrope", marks=pytest.mark.full),
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
]


@torch.inference_mode()
@pytest.mark.parametrize("name", POOLS)
def test_a_pooled_prompt_is_the_models_own_with_means_in_place_of_features(name: str) -> None:
    """Against a forward over embeddings that are put together by hand, row by row."""
    loaded = built(name)
    share = 0.3
    whole = loaded.adapter.encode_chats(CHATS)
    grids = picture_grids(loaded.adapter, whole, CHATS)
    inner = loaded.model.model
    media = {key: whole[key] for key in ("pixel_values", "image_grid_thw") if key in whole}
    own = (
        {}
        if "image_grid_thw" in media
        else {"vision_feature_layer": loaded.model.config.vision_feature_layer}
    )
    strategy = getattr(loaded.model.config, "vision_feature_select_strategy", None)
    own |= {"vision_feature_select_strategy": strategy} if own else {}
    features = inner.get_image_features(**media, **own, return_dict=True).pooler_output

    with smaller_pictures(loaded, PicturePolicy(kind="pooled", share=share)) as smaller:
        encoding = smaller.adapter.encode_chats(CHATS)
        logits = smaller.model(**encoding).logits
        other: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: other.append(last(loaded, whole)))
        thread.start()
        thread.join()
    torch.testing.assert_close(
        last(loaded, whole), other[0]
    )  # neither another thread nor what comes later is pooled
    assert "get_image_features" not in vars(inner)
    assert smaller.settings_hash != loaded.settings_hash

    number = 0
    for row, own_grids in enumerate(grids):
        wanted = [smaller_grid(*grid, share) for grid in own_grids]
        fewer = [
            means(features[number + i], g, w) for i, (g, w) in enumerate(zip(own_grids, wanted, strict=True))
        ]
        number += len(own_grids)
        ids = whole["input_ids"][row][whole["attention_mask"][row].bool()].tolist()
        kept, vectors, left = [], [], []
        table = loaded.model.get_input_embeddings()
        for (height, width), (less, narrow) in zip(own_grids, wanted, strict=True):
            left += [True] * (less * narrow) + [False] * (height * width - less * narrow)
        left_of, parts = iter(left), iter(torch.cat(fewer))
        for token in ids:
            vision = token in loaded.adapter.vision_token_ids
            if vision and not next(left_of):
                continue
            kept.append(token)
            vectors.append(next(parts) if vision else table(torch.tensor(token)))
        tokens = len(kept)
        real = encoding["attention_mask"][row].bool()
        assert encoding["input_ids"][row][real].tolist() == kept
        positions = None
        if "image_grid_thw" in whole:
            merge = loaded.model.config.vision_config.spatial_merge_size
            sizes = torch.tensor([[1, a * merge, b * merge] for a, b in wanted])
            kinds = torch.tensor([[int(token in loaded.adapter.vision_token_ids) for token in kept]])
            positions, _ = inner.get_rope_index(
                torch.tensor([kept]), mm_token_type_ids=kinds, image_grid_thw=sizes
            )
        states = inner.language_model(inputs_embeds=torch.stack(vectors)[None], position_ids=positions)
        expected = loaded.model.lm_head(states.last_hidden_state)[0]
        assert len(expected) == tokens
        torch.testing.assert_close(logits[row][real], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["tiny-mrope", "qwen2_vl", "qwen3_vl"],
)
def test_a_smaller_picture_is_what_the_processor_makes_of_it(name: str) -> None:
    loaded = built(name)
    config = loaded.model.config.vision_config
    side = config.patch_size * config.spatial_merge_size
    grids = picture_grids(loaded.adapter, loaded.adapter.encode_chats(CHATS), CHATS)
    limits = dict(loaded.adapter.processor.image_processor.size)
    with smaller_pictures(loaded, PicturePolicy(kind="resized", share=0.4)) as smaller:
        encoding = smaller.adapter.encode_chats(CHATS)
        found = picture_grids(loaded.adapter, encoding, CHATS)
    assert found == [[smaller_grid(*grid, 0.4) for grid in row] for row in grids]
    assert dict(loaded.adapter.processor.image_processor.size) == limits
    assert loaded.adapter.processor.image_processor.do_resize
    # a processor whose limits allow such pictures leaves them as they are
    free = built(name)
    free.adapter.processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": 10**7}
    how = Image.Resampling(int(loaded.adapter.processor.image_processor.resample))

    def shrunk_by_hand(message, row) -> Message:
        sized = zip(message.images, row, strict=True)
        return replace(message, images=tuple(p.resize((b * side, a * side), how) for p, (a, b) in sized))

    shrunk = [[shrunk_by_hand(m, row)] for (m,), row in zip(CHATS, found, strict=True)]
    for key, value in free.adapter.encode_chats(shrunk).items():
        torch.testing.assert_close(encoding[key], value)


def test_what_cannot_be_made_smaller_is_refused(tiny) -> None:
    refused = {"resized": "gives every picture as many vision tokens"}
    for kind, message in refused.items():
        shown = PicturePolicy(kind=kind, share=0.5)
        with pytest.raises(UserError, match=message), smaller_pictures(tiny, shown):
            pass
    for plain in (None, PicturePolicy(kind="resized")):  # which ask for nothing, of any family
        with smaller_pictures(tiny, plain) as same:
            assert same is tiny
    assert "qwen3_vl" not in FAMILIES["pooled"]
    (sample,) = load_task("shapes").samples("search", 1)
    (message,) = sample.messages()
    film = [[Message("user", "what?", videos=((message.images[0],) * 2,))]]
    with pytest.raises(UserError, match="shows a video"):
        picture_grids(tiny.adapter, tiny.adapter.encode_samples([sample]), film)
    before = vars(tiny.model.model).copy()
    half = PicturePolicy(kind="pooled", share=0.5)
    with pytest.raises(RuntimeError, match="inside"), smaller_pictures(tiny, half):
        raise RuntimeError("inside")
    assert vars(tiny.model.model) == before
