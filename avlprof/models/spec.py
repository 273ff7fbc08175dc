"""Which model, and how to load it: what travels together from a command line to a worker."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypedDict

Scalar = str | int | float | bool | None


class ModelOptions(TypedDict, total=False):
    """The fields of `ModelSpec` beside the name, as keyword arguments."""

    device: str
    dtype: str
    revision: str | None
    trust_remote_code: bool
    device_map: str | dict[str, int | str] | None
    quantize: str | None
    attention: str | None
    model_args: dict[str, Scalar] | None


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it.

    Attributes:
        name: alias (`avlprof.models.ALIASES`), hub id (`owner/name`) or local folder.
        device: `auto` (CUDA when there is one), `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `float32`, `bfloat16`, `float16` (short: `fp32`, `bf16`, `fp16`), or `auto`: float32 on
            a CPU; elsewhere bfloat16 for hub models and what the config says for folders.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
        device_map: spread a model that is larger than a GPU over several, by accelerate, in place
            of `device`: a way of transformers (`auto`, ...) or a dict of modules and devices.
        quantize: `4bit` (NF4, computed in `dtype`) or `8bit`, by bitsandbytes while loading.
        attention: implementation of the language model's attention: `sdpa`, `eager`,
            `flash_attention_2`, ..., or a kernel of the hub (`owner/name`); by default transformers'.
        model_args: further arguments of `from_pretrained`: fields of the model's config, and
            arguments of the model.
    """

    name: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    device_map: str | dict[str, int | str] | None = None
    quantize: str | None = None
    attention: str | None = None
    model_args: dict[str, Scalar] | None = None

    def words(self) -> list[str]:
        """The command-line options that name this model to another process; defaults are left out."""
        words = ["--model", self.name]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = f"--{field.name.replace('_', '-')}"
            if field.name == "model_args":
                words += [word for name, one in value.items() for word in (option, f"{name}={_yaml(one)}")]
            else:
                words += [option] if value is True else [option, str(value)]
        return words


def _yaml(value: Any) -> str:
    """A value as the command line reads it."""
    import yaml

    text: str = yaml.safe_dump(value, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
