"""Where and in which precision a model runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import torch

from avlprof.errors import UserError
from avlprof.registry import unknown

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DEVICE_MAPS: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of transformers to spread a model's layers over devices."""


def own_device(name: str, process: int) -> str:
    """The device of one of the processes of a machine: "auto" and "cuda" become a GPU of its own.

    More processes than GPUs share them in turn. A process that sees one GPU alone gets that one.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{process % torch.cuda.device_count()}"
    return name


def check_device_map(device_map: str | dict[str, Any] | None, device: str) -> None:
    """`UserError` when a model cannot be spread over devices as asked."""
    if device_map is None:
        return
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise unknown("device map", device_map, DEVICE_MAPS)
    if device != "auto":
        raise UserError(f"give a device or a device map, not both; got '{device}' and '{device_map}'")
    if find_spec("accelerate") is None:
        raise UserError("a device map needs accelerate; pip install accelerate")


def resolve_device(name: str) -> torch.device:
    """A device that exists; "auto" is CUDA when there is one, else the CPU.

    Raises:
        UserError: no such kind of device, or none of it on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device '{name}' is not on this machine ({count} CUDA devices); use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not on this machine; use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device, config: Any, *, hub: bool) -> torch.dtype:
    """The precision by name; "auto" is float32 on CPU, elsewhere bfloat16 or what a folder's config says.

    Raises:
        UserError: no such precision.
    """
    if name != "auto":
        if name not in DTYPES:
            raise unknown("dtype", name, ["auto", *DTYPES])
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    stated = None if hub else getattr(config, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else torch.bfloat16


def keep_soft_cap(model: Any) -> None:
    """Runs a language model with soft-capped logits (Gemma 2) in eager attention where it would run in sdpa.

    sdpa has no cap. transformers refuses the pair or never chooses it since a version after 5.17;
    before, it left the cap out and said nothing.
    """
    text = model.config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if capped and text._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": "eager"})
