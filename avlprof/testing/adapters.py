"""What every model family must satisfy; the author of one inherits these tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from avlprof.attention.session import with_cache
from avlprof.models.adapter import Adapter
from avlprof.models.families import adapter_for
from avlprof.models.generation import greedy
from avlprof.models.tiles import Layout
from avlprof.testing.models import TinyCase


class FamilyConformance:
    """Tests of an adapter on a random model, without a processor.

    Subclass it in a test module and set `build`::

        class TestMine(FamilyConformance):
            build = staticmethod(random_mine)
    """

    build: Callable[[], TinyCase]

    @cached_property
    def case(self) -> TinyCase:
        return self.build()

    @cached_property
    def adapter(self) -> Adapter:
        return adapter_for(self.case.model)

    def test_vision_positions_are_the_features(self) -> None:
        inputs = self.case.inputs(3, seed=1, pad=True, images_per_row=[1, 0, 2])
        assert set(self.case.vision_token_ids) == set(self.adapter.vision_token_ids)
        marked = self.adapter.vision_mask(inputs["input_ids"])
        assert int(marked.sum()) == len(image_features(self.case.model, inputs))
        assert not bool((marked & (inputs["attention_mask"] == 0)).any())
        assert not bool(marked[1].any())

    def test_vision_tokens_carry_the_picture(self) -> None:
        """Another picture changes the embeddings at vision positions, and nowhere else."""
        inputs = self.case.inputs(1, seed=2)
        other = dict(inputs, pixel_values=inputs["pixel_values"].flip(0, -1))
        first, second = (decoder_inputs(self.case.model, self.adapter, batch) for batch in (inputs, other))
        changed = (first != second).any(dim=-1)
        assert torch.equal(changed, self.adapter.vision_mask(inputs["input_ids"]))

    def test_shapes_are_those_of_the_cache(self) -> None:
        inputs = self.case.inputs(2, seed=3)
        cache = DynamicCache(config=self.case.model.config)
        with torch.no_grad():
            self.case.model(**inputs, **with_cache(self.case.model, cache))
        rows, tokens = inputs["input_ids"].shape
        adapter = self.adapter
        assert len(cache.layers) == adapter.layers
        assert set(adapter.sliding_layers) <= set(range(adapter.layers))
        for index, layer in enumerate(cache.layers):
            if index not in adapter.sliding_layers:
                assert layer.keys.shape == (rows, adapter.kv_heads, tokens, adapter.head_dim)
                held = layer.keys.nbytes + layer.values.nbytes
                assert held == rows * tokens * adapter.kv_bytes_per_token_per_layer(layer.keys.dtype)
        assert adapter.heads % adapter.kv_heads == 0

    def test_layout_holds_every_vision_token(self) -> None:
        """None where the picture's size decides; else all tokens, each patch in one tile alone."""
        inputs = self.case.inputs(2, seed=4, pad=True)
        counts = self.adapter.vision_mask(inputs["input_ids"]).sum(dim=1).tolist()
        for image, count in enumerate(counts):
            self._check(self.adapter.image_layout(inputs, image), count)

    def test_layout_of_a_video_holds_every_vision_token(self) -> None:
        if self.case.videos is None:
            assert self.adapter.video_layout(self.case.inputs(1), 0) is None
            return
        inputs = self.case.inputs(2, seed=4, images_per_row=0, videos_per_row=1)
        counts = self.adapter.vision_mask(inputs["input_ids"]).sum(dim=1).tolist()
        for video, count in enumerate(counts):
            layout = self.adapter.video_layout(inputs, video)
            self._check(layout, count)
            assert layout is None or len({tile.frame for tile in layout.tiles}) == len(layout.tiles) > 1

    def _check(self, layout: Layout | None, count: int) -> None:
        if layout is None:
            return
        assert layout.tokens == count
        patches = [int(token) for tile in layout.tiles for token in tile.tokens().ravel()]
        assert len(set(patches)) == len(patches)
        assert set(patches) <= set(range(count))

    def test_left_padding_changes_nothing(self) -> None:
        batch = self.case.inputs(3, seed=5, pad=True, images_per_row=[2, 1, 0])
        real = batch["attention_mask"].bool()
        assert bool(real[:, -1].all())
        assert not bool(real.all())
        last = int(real.shape[0]) - 1  # the row without images can run alone
        alone = {n: t[last:, real[last]] for n, t in batch.items() if t.shape == real.shape}
        with torch.no_grad():
            padded = self.case.model(**batch).logits[last, -1]
            bare = self.case.model(**alone).logits[0, -1]
        torch.testing.assert_close(padded, bare, atol=1e-4, rtol=1e-4)


class ProcessorConformance:
    """Tests of an adapter with the family's processor.

    Subclass it and set `build`; the two prompts differ in length::

        class TestMineProcessor(ProcessorConformance):
            build = staticmethod(lambda: load_model("models/mine").adapter)
    """

    build: Callable[[], Adapter]
    prompts: tuple[str, str] = ("what is this?", "describe the image in a few words, please.")

    @cached_property
    def adapter(self) -> Adapter:
        return self.build()

    @cached_property
    def pictures(self) -> tuple[Image.Image, Image.Image]:
        return Image.new("RGB", (61, 47), "red"), Image.linear_gradient("L").convert("RGB")

    def test_vision_tokens_match_the_features(self) -> None:
        batch = self.adapter.encode(self.prompts, [[self.pictures[0]], list(self.pictures)])
        marked = self.adapter.vision_mask(batch["input_ids"]).sum(dim=1)
        assert int(marked.sum()) == len(image_features(self.adapter.model, batch))
        assert int(marked[1]) > int(marked[0]) > 0

    def test_decode_returns_the_prompt(self) -> None:
        batch = self.adapter.encode(self.prompts, [[picture] for picture in self.pictures])
        text = batch["input_ids"].masked_fill(self.adapter.vision_mask(batch["input_ids"]), self._pad)
        for prompt, decoded in zip(self.prompts, self.adapter.decode(text), strict=True):
            assert prompt in decoded
            assert decoded == decoded.strip()

    def test_rows_are_padded_on_the_left(self) -> None:
        rows = [[picture] for picture in self.pictures]
        batch = self.adapter.encode(self.prompts, rows)
        for index, (prompt, row) in enumerate(zip(self.prompts, rows, strict=True)):
            alone = self.adapter.encode([prompt], [row])["input_ids"][0]
            real = batch["attention_mask"][index].bool()
            assert torch.equal(batch["input_ids"][index][real], alone)
            assert bool(real[-len(alone) :].all())

    def test_beginning_of_text_stands_once(self) -> None:
        begin = self.adapter.processor.tokenizer.bos_token_id
        ids = self.adapter.encode(self.prompts[:1], [[self.pictures[0]]])["input_ids"][0].tolist()
        assert begin is None or ids.count(begin) <= 1

    def test_answers_are_generated(self) -> None:
        batch = self.adapter.encode(self.prompts, [[picture] for picture in self.pictures])
        with torch.no_grad():
            out = greedy(self.adapter.model, batch, max_new_tokens=3)
        assert len(self.adapter.decode(out[:, batch["input_ids"].shape[1] :])) == len(self.prompts)

    @property
    def _pad(self) -> int:
        return int(self.adapter.processor.tokenizer.pad_token_id)


def image_features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Features of all images as the model itself makes them, [vision tokens, width]."""
    companions = ("image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
    extra = {name: inputs[name] for name in companions if name in inputs}
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], **extra, return_dict=True)
    parts = features.pooler_output if hasattr(features, "pooler_output") else features
    return torch.cat([part.flatten(0, -2) for part in parts])


def decoder_inputs(model: Any, adapter: Adapter, inputs: dict[str, Tensor]) -> Tensor:
    """What the decoder is given, [rows, tokens, width]."""
    caught: list[Tensor] = []
    handle = adapter.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return caught[0]
