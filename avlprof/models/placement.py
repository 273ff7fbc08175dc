"""Where, in which precision, and with which attention a model runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import torch

from avlprof.errors import UserError
from avlprof.registry import unknown

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SYNONYMS: Final = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "f16": "float16",
    "fp32": "float32", "f32": "float32", "float": "float32", "full": "float32",
}  # fmt: skip
"""What people call precisions elsewhere."""

QUANTIZERS: Final = ("4bit", "8bit")

ATTENTIONS: Final = {
    "sdpa": None, "eager": None, "flex_attention": None,
    "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_3",
    "flash_attention_4": "flash_attn_4",
}  # fmt: skip
"""Implementations of attention that transformers knows by name, and the module that each needs."""

OWN_ARGUMENTS: Final = {
    "pretrained_model_name_or_path": "--model", "config": "--model", "state_dict": "--model",
    "dtype": "--dtype", "torch_dtype": "--dtype", "device": "--device", "device_map": "--device-map",
    "attn_implementation": "--attention", "quantization_config": "--quantize", "load_in_4bit": "--quantize",
    "load_in_8bit": "--quantize", "revision": "--revision", "trust_remote_code": "--trust-remote-code",
    "output_loading_info": None, "ignore_mismatched_sizes": None, "local_files_only": None,
    "return_unused_kwargs": None,
}  # fmt: skip
"""Arguments of `from_pretrained` that loading sets by itself, and the option that sets each of them."""

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
        name = SYNONYMS.get(name, name)
        if name not in DTYPES:
            raise unknown("dtype", name, ["auto", *DTYPES])
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    stated = None if hub else getattr(config, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else torch.bfloat16


def check_arguments(arguments: dict[str, Any] | None) -> None:
    """`UserError` for a model argument that loading sets by itself."""
    for name in arguments or {}:
        if name in OWN_ARGUMENTS:
            option = OWN_ARGUMENTS[name]
            remedy = f"use {option}" if option else "leave it out"
            raise UserError(f"model argument '{name}' is set by avlprof itself; {remedy}")


def check_attention(name: str | None) -> None:
    """`UserError` for an implementation of attention that is not known, or whose package is missing."""
    if name is None or "/" in name:
        if name is not None and find_spec("kernels") is None:
            raise UserError(f"attention '{name}' of the hub needs the package kernels; pip install kernels")
        return
    if name not in ATTENTIONS:
        raise unknown("attention", name, [*ATTENTIONS, "kernels-community/flash-attn2"])
    module = ATTENTIONS[name]
    if module is not None and find_spec(module) is None:
        raise UserError(
            f"attention '{name}' needs the package {module.replace('_', '-')}, which is not installed; "
            "install it, or use --attention sdpa"
        )


def attention_argument(name: str | None, config: Any) -> dict[str, Any]:
    """The argument of `from_pretrained` that gives the language model alone an attention."""
    if name is None:
        return {}
    text = config.get_text_config(decoder=True)
    key = next(
        (key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is text), None
    )
    return {"attn_implementation": name if key is None else {key: name}}


def quantization(name: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The argument of `from_pretrained` that quantises weights while they are loaded.

    Raises:
        UserError: the way is not known, or what it needs is not installed.
    """
    if name is None:
        return {}
    if name not in QUANTIZERS:
        raise unknown("quantization", name, QUANTIZERS)
    missing = [package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None]
    if missing:
        raise UserError(f"--quantize needs {' and '.join(missing)}; pip install 'avlprof[quantize]'")
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}


def keep_soft_cap(model: Any) -> None:
    """Runs a language model with soft-capped logits (Gemma 2) in eager attention where it would run in sdpa.

    sdpa has no cap. transformers refuses the pair or never chooses it since a version after 5.17;
    before, it left the cap out and said nothing.
    """
    text = model.config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if capped and text._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": "eager"})
