"""Kernels compiled ahead of time for GPUs that are not here: registers, memory, tiles."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
STRIDES = (  # multiples of 16
    *("query_b", "query_h", "query_n", "key_b", "key_h", "key_n", "length", "size"),
    *("value_b", "value_h", "value_n", "key_size", "value_size"),
)
COUNTS = (
    *STRIDES,
    *("mask_b", "mask_h", "mask_r", "mask_n", "batch", "count", "slot_count", "text_count", "tokens"),
    *("heads", "group", "got_count", "columns", "lines", "keys_each"),
)
MOVED = tuple(f"{buffer}_{axis}" for buffer in ("key", "value", "position") for axis in "bhn")
DECODED = {
    **dict.fromkeys(("sums", "tallies", "logits", "scores"), "*fp32"),
    **dict.fromkeys(("value", "out"), "*bf16"),
    **dict.fromkeys(("firsts", "lasts", "coded_firsts"), "*i64"),
    **dict.fromkeys(("key_codes", "value_codes"), "*u8"),
    **{f"{what}_{part}": "*fp16" for what in ("key", "value") for part in ("scale", "offset")},
    **dict.fromkeys(("sets", "parts", "coded", "first", "group", "heads", "length"), "i32"),
}
"""Arguments of the kernels of decoding steps that have other types there."""
LAID_OUT = {
    **dict.fromkeys(("key", "value", "keys", "values"), "*bf16"),
    **dict.fromkeys(("order", "places"), "*i64"),
    **dict.fromkeys(("modality_b", "columns", "left", "slots", "kept", "capacity", "position_n"), "i32"),
    "modality": "*i8",
}
FLOATS = ("scaling", "softcap")
SUMS = ("out", "lse", "covered", "texts", "shares", "values", "partial")
ONE_TILE = {"causal": True, "masked": False, "capped": False, "width": 128, "key_block": 64}
ROWS = ONE_TILE | {"measured": True, "history": False, "bounds": 24, "bin_width": 32, "row_block": 64}
MASKED = {"causal": False, "masked": True, "mask_n": 1, "history": True, "row_block": 32}
SUMS_OF_KEYS = ONE_TILE | {"every": False, "per_head": False, "row_block": 64}
DECODE = {
    **{"size": 128, "value_size": 128, "width": 128, "value_width": 128, "row_block": 16, "key_block": 64},
    **{"sunk": False, "weighing": False, "valued": True, "bounded": True, "low": False, "capped": False},
    **{"key_bits": 8, "value_bits": 8, "key_group": 32, "value_group": 32, "alone": False},
}
MERGE = {"value_size": 128, "sunk": True, "weighing": True, "valued": True, "bounded": True, "low": True}
KERNELS = {
    "rows": ("tracing.triton_kernels", "row_sums", 4, ROWS),
    "masked rows": ("tracing.triton_kernels", "row_sums", 8, ROWS | MASKED),
    "received": ("tracing.triton_sums", "received_sums", 8, SUMS_OF_KEYS),
    "received of all": (
        "tracing.triton_sums",
        "received_sums",
        4,
        SUMS_OF_KEYS | {"every": True, "row_block": 32},
    ),
    "merge": (
        *("tracing.triton_kernels", "row_merge", 4),
        {"splits": 4, "sunk": True, "bounds": 24, "line_block": 32, "width": 32},
    ),
    "coverage": (
        *("tracing.triton_sums", "coverage_counts", 4),
        {"causal": True, "levels": 5, "span": 4096, "halvings": 15},
    ),
    "choice of the core": ("runtime.triton_exchange", "core_choice", 8, {"block": 2048}),
    "exchange": ("runtime.triton_exchange", "exchange_pairs", 4, {"block": 16, "width": 128}),
    "decode": ("attention.triton_decode_kernels", "decode_parts", 4, DECODE),
    "decode and weigh": (
        "attention.triton_decode_kernels",
        "decode_parts",
        4,
        DECODE | {"weighing": True, "sunk": True},
    ),
    "decode in one": (
        "attention.triton_decode_kernels",
        "decode_parts",
        4,
        DECODE | {"alone": True, "capped": True},
    ),
    "weigh": (
        "attention.triton_decode_kernels",
        "decode_parts",
        4,
        DECODE | {"weighing": True, "valued": False},
    ),
    "decode 8 bits": ("attention.triton_decode_kernels", "decode_parts", 4, DECODE | {"low": True}),
    "decode 4 bits": (
        *("attention.triton_decode_kernels", "decode_parts", 4),
        DECODE | {"low": True, "key_bits": 4, "value_bits": 4, "weighing": True},
    ),
    "decode 2 bits": (
        *("attention.triton_decode_kernels", "decode_parts", 4),
        DECODE | {"low": True, "key_bits": 2, "value_bits": 2},
    ),
    "merge of decode": (
        *("attention.triton_decode_kernels", "decode_merge", 4),
        MERGE | {"part_block": 32, "width": 128, "block": 256},
    ),
    "order of a prompt": ("runtime.triton_layout", "order_columns", 8, {"fields": 6, "block": 2048}),
    "take a prompt": ("runtime.triton_layout", "take_columns", 4, {"block": 16, "width": 128}),
    "kinds": ("tracing.triton_sums", "kind_sums", 4, {"row_block": 32, "width": 32}),
}


def compiled(name, capability):
    """A kernel's compiler output, for arguments as they come: aligned, in bf16."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function, warps, constants = KERNELS[name]
    kernel = getattr(importlib.import_module(f"avlprof.{module}"), function)
    types = dict.fromkeys(COUNTS, "i32") | dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(SUMS, "*fp32")
    types |= {"scores": "*fp32", "edges": "*i64", "keys": "*bf16", "positions": "*i64"}
    types |= dict.fromkeys(("score_b", "score_g", "position_g", "start"), "i32")
    if name == "exchange":
        types["values"] = "*bf16"
    types |= dict.fromkeys((*MOVED, "most", "groups", "position_heads", "key_size", "value_size"), "i32")
    types |= {"query": "*bf16", "key": "*bf16", "mask": "*u8", "sinks": "*bf16"}
    if module == "attention.triton_decode_kernels":
        types |= DECODED
    if module == "runtime.triton_layout":
        types |= LAID_OUT
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "*i32")
        for argument in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or (argument in STRIDES and argument not in constants)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def spilled(binary, folder):
    """Bytes of stack that a thread needs, which is where registers spill to."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    shown = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    return max(int(found) for found in re.findall(r"STACK:(\d+)", shown.stdout + shown.stderr))


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found = compiled(name, capability)
    assert found.metadata.shared <= 100 * 1024  # two programs a processor
    # a few registers may spill in the pass over rows: with 8 warps none do, and it takes 1.6 times as long
    assert spilled(found.asm["cubin"], tmp_path) <= (512 if name in ("rows", "masked rows") else 32)
    tile = KERNELS[name][3].get("key_block") and KERNELS[name][3]["row_block"]
    if tile:
        products = r"wgmma\.mma_async" if capability == 90 and tile == 64 else r"mma\.sync"
        assert re.search(products, found.asm["ptx"])
        assert re.search(r"cp\.async\.cg|ld\.global\S*\.v4", found.asm["ptx"])  # 16 bytes at a time
