"""Small random models of every tested family: no network, no processor, milliseconds to build.

Their weights are spread so that attention is peaked and logits have clear margins; an untrained
transformer attends almost uniformly, and a test on it would miss most mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

PAD: Final = 0
BOS: Final = 1
IMAGE: Final = 2
VIDEO: Final = 3
FIRST_WORD: Final = 4
VOCABULARY: Final = 101

Pixels = Callable[[int, torch.Generator, bool], tuple[list[int], dict[str, Tensor]]]
Videos = Callable[[int, torch.Generator], tuple[list[list[int]], dict[str, Tensor]]]
Companions = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class TinyCase:
    """One row of the test matrix: a random model in eval mode and a maker of its inputs.

    `pixels(images, generator, uneven)` gives the number of vision tokens of each image and the
    pixel tensors of all of them; with `uneven` the images may differ in size. `videos(count,
    generator)` gives the ids that stand for each video in the prompt, and their tensors; None where
    the family has none. `companions(ids)` gives what the family takes beside the ids of prompts
    with images, `[batch, tokens]` each.
    """

    name: str
    model: Any
    vision_token_ids: tuple[int, ...]
    pixels: Pixels
    companions: Companions = lambda ids: {}
    videos: Videos | None = None

    def inputs(
        self,
        batch: int = 1,
        seed: int = 0,
        pad: bool = False,
        text: int = 9,
        images_per_row: int | Sequence[int] = 1,
        videos_per_row: int | Sequence[int] = 0,
    ) -> dict[str, Tensor]:
        """A batch for `model(**inputs)` and `model.generate(**inputs)`.

        A row is the beginning-of-text token, two text tokens, and then its images and videos with
        the other text tokens spread behind each of them. `text` counts a row's text tokens without the
        first; with `pad`, row i has 2 * i fewer (never under 3) and images differ in size where
        the family allows it. Shorter rows are padded on the left.

        Returns:
            `input_ids` and `attention_mask`, int64 [batch, tokens]; `pixel_values` and the
            family's companions of them and of the ids, absent if no row has an image or video.
        """
        generator = torch.Generator().manual_seed(seed)
        counts = _counts("images_per_row", images_per_row, batch)
        filmed = _counts("videos_per_row", videos_per_row, batch)
        sizes, extra = self.pixels(sum(counts), generator, pad) if sum(counts) else ([], {})
        media = iter([[IMAGE] * size for size in sizes])
        films: Iterator[list[int]] = iter(())
        if sum(filmed):
            if self.videos is None:
                raise ValueError(f"{self.name} has no videos, got videos_per_row {videos_per_row}")
            filmed_ids, tensors = self.videos(sum(filmed), generator)
            if tensors.keys() & extra.keys():
                raise ValueError(f"{self.name} has pictures and videos in one tensor; ask for one of them")
            films, extra = iter(filmed_ids), extra | tensors
        rows = []
        for index, (images, videos) in enumerate(zip(counts, filmed, strict=True)):
            words = max(3, text - 2 * index) if pad else text
            rows.append(_row(words, [*islice(media, images), *islice(films, videos)], generator))
        width = max(len(row) for row in rows)
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if extra:
            inputs |= self.companions(ids)
        for name, value in extra.items():
            inputs[name] = value.to(self.model.dtype) if value.is_floating_point() else value
        return {name: value.to(self.model.device) for name, value in inputs.items()}


def random_llava(
    seed: int = 0,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    head_dim: int = 16,
    grid: int = 5,
    sinks: bool = False,
) -> TinyCase:
    """A random LLaVA with `grid` x `grid` vision tokens an image; `kv_heads == heads` is plain multi-head.

    With `sinks` its language model is GPT-OSS: each query head has a learned attention sink.
    """
    patch = 4
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
    }
    text = GptOssConfig(**sizes, **sunk(["full_attention"] * layers)) if sinks else LlamaConfig(**sizes)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=grid * patch,
        patch_size=patch,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=grid * grid
    )

    def pixels(images: int, generator: torch.Generator, uneven: bool) -> tuple[list[int], dict[str, Tensor]]:
        side = grid * patch
        return [grid * grid] * images, {
            "pixel_values": torch.randn(images, 3, side, side, generator=generator)
        }

    name = f"llava-{heads}q{kv_heads}kv" + "-sinks" * sinks
    return TinyCase(name, finished(LlavaForConditionalGeneration, config, seed), (IMAGE,), pixels)


def random_qwen2_5_vl(
    seed: int = 0, *, heads: int = 6, kv_heads: int = 2, layers: int = 3, grid: tuple[int, int] = (5, 4)
) -> TinyCase:
    """A random Qwen2.5-VL (mrope, grouped queries) with rows x columns = `grid` vision tokens an image."""
    patch, merge, head_dim = 4, 2, 16
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": heads * head_dim,
            "intermediate_size": 2 * heads * head_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": BOS,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": patch,
            "spatial_merge_size": merge,
            "window_size": 2 * patch * merge,
            "fullatt_block_indexes": [1],
            "out_hidden_size": heads * head_dim,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VOCABULARY - 1,
        vision_end_token_id=VOCABULARY - 2,
    )

    def pixels(images: int, generator: torch.Generator, uneven: bool) -> tuple[list[int], dict[str, Tensor]]:
        cells = torch.tensor([grid] * images)
        if uneven:
            cells = cells + torch.randint(0, 3, cells.shape, generator=generator)
        grids = torch.cat([torch.ones(images, 1, dtype=torch.long), cells * merge], dim=1)
        width = 3 * int(config.vision_config.temporal_patch_size) * patch**2
        values = torch.randn(int(grids.prod(dim=1).sum()), width, generator=generator)
        return cells.prod(dim=1).tolist(), {"pixel_values": values, "image_grid_thw": grids}

    def videos(count: int, generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        grids = torch.tensor([[2 + index, 2 * merge, 3 * merge] for index in range(count)])
        width = 3 * int(config.vision_config.temporal_patch_size) * patch**2
        values = torch.randn(int(grids.prod(dim=1).sum()), width, generator=generator)
        tokens = (grids.prod(dim=1) // merge**2).tolist()
        return [[VIDEO] * n for n in tokens], {"pixel_values_videos": values, "video_grid_thw": grids}

    name = f"qwen2_5_vl-{heads}q{kv_heads}kv"
    model = finished(Qwen2_5_VLForConditionalGeneration, config, seed)
    return TinyCase(name, model, (IMAGE, VIDEO), pixels, image_types("mm_token_type_ids"), videos)


def cases() -> list[tuple[str, Callable[[], TinyCase]]]:
    """The one matrix of models that tests run over: name and builder of each."""
    return [
        ("llava-4q2kv", random_llava),
        ("llava-3q3kv", lambda: random_llava(1, heads=3, kv_heads=3, grid=4)),
        ("qwen2_5_vl-6q2kv", random_qwen2_5_vl),
        ("llava-4q2kv-sinks", lambda: random_llava(2, sinks=True)),
    ]


def _counts(name: str, stated: int | Sequence[int], batch: int) -> list[int]:
    counts = [stated] * batch if isinstance(stated, int) else list(stated)
    if len(counts) != batch:
        raise ValueError(f"{name} must have {batch} entries, got {len(counts)}")
    return counts


def _row(words: int, media: list[list[int]], generator: torch.Generator) -> list[int]:
    drawn = torch.randint(FIRST_WORD, VOCABULARY - 2, (words,), generator=generator).tolist()
    row = [BOS, *drawn[:2]]
    rest = drawn[2:]
    for index, ids in enumerate(media):
        begin, end = index * len(rest) // len(media), (index + 1) * len(rest) // len(media)
        row += ids + rest[begin:end]
    return row if media else row + rest


def sunk(kinds: list[str], window: int = 128) -> dict[str, Any]:
    """What a small GPT-OSS config needs beside sizes: kinds of layers, few experts, plain RoPE."""
    return {
        "layer_types": kinds,
        "sliding_window": window,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    } | {"bos_token_id": BOS, "eos_token_id": None, "pad_token_id": PAD}


def image_types(name: str) -> Companions:
    """Companions of one tensor `name`, int64: 1 on image tokens, 2 on video tokens and 0 elsewhere."""
    return lambda ids: {name: (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def finished(kind: Any, config: Any, seed: int) -> Any:
    """A model of class `kind` in eval mode, its weights spread as the module says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        _spread(model)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, do_sample=False)
    return model


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Activations near unit size, attention logits of standard deviation near 2, output logits near 3."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            gain = 1.5 if name.endswith(("q_proj", "k_proj")) else 3.0 if name.endswith("lm_head") else 1.0
            nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    for name, value in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(value, mean=4.0)  # a fair share of a row
        elif name.endswith("router.weight") or (value.ndim == 3 and ".experts." in name):
            nn.init.normal_(value, std=value.shape[1] ** -0.5)
