"""Short names of models: alias to hub id, family, and how far it was tested here. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Tested = Literal["embedded", "measured here", "random-weight tests", "not yet tested"]

Special = Literal[
    "tiles",
    "newline tokens",
    "own grid",
    "video",
    "mrope",
    "deepstack",
    "several features",
    "sliding layers",
    "two-way pictures",
    "two-way prefix",
    "soft cap",
]

EMBEDDED: Final = "embedded"
FETCHED: Final = "fetched"


@dataclass(frozen=True)
class Alias:
    """One short name.

    `source` is a Hugging Face hub id, `EMBEDDED` for a model inside this package, or `FETCHED` for
    the one that `avlprof models fetch` puts together; `family` is the `model_type` of its config.
    `tested` says what was run in this project: the embedded models are loaded and run in the tests;
    "measured here" means that it was run and measured, but not by the tests, which need no network;
    "random-weight tests" that small random models of the family pass them; "not yet tested" that the
    generic adapter is expected to serve.
    `special` names what sets the model apart, in words that `docs/models.md` explains.
    """

    source: str
    family: str
    tested: Tested
    special: tuple[Special, ...] = ()


_RANDOM: Final = "random-weight tests"
_UNTESTED: Final = "not yet tested"

ALIASES: Final[dict[str, Alias]] = {
    "tiny": Alias(EMBEDDED, "llava", "embedded"),
    "tiny-mrope": Alias(EMBEDDED, "qwen2_5_vl", "embedded", ("own grid", "mrope")),
    "small": Alias(FETCHED, "llava", "measured here"),
    "llava": Alias("llava-hf/llava-1.5-7b-hf", "llava", _RANDOM),
    "llava-13b": Alias("llava-hf/llava-1.5-13b-hf", "llava", _RANDOM),
    "vip-llava": Alias("llava-hf/vip-llava-7b-hf", "vipllava", _RANDOM, ("several features",)),
    "llava-next": Alias(
        "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", _RANDOM, ("tiles", "newline tokens")
    ),
    "llava-next-vicuna": Alias(
        "llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next", _RANDOM, ("tiles", "newline tokens")
    ),
    "llava-onevision": Alias(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava_onevision",
        _RANDOM,
        ("tiles", "newline tokens", "video"),
    ),
    "qwen2-vl": Alias("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", _RANDOM, ("own grid", "video", "mrope")),
    "qwen2.5-vl": Alias("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", _RANDOM, ("own grid", "video", "mrope")),
    "qwen3-vl": Alias(
        "Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", _RANDOM, ("own grid", "video", "mrope", "deepstack")
    ),
    "glm4.1v": Alias("zai-org/GLM-4.1V-9B-Thinking", "glm4v", _RANDOM, ("own grid", "video", "mrope")),
    "paligemma": Alias("google/paligemma-3b-mix-224", "paligemma", _RANDOM, ("two-way prefix",)),
    "internvl3": Alias("OpenGVLab/InternVL3-8B-hf", "internvl", _RANDOM, ("tiles", "video")),
    "smolvlm": Alias("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm", _RANDOM, ("tiles", "video")),
    "idefics3": Alias("HuggingFaceM4/Idefics3-8B-Llama3", "idefics3", _RANDOM, ("tiles",)),
    "gemma3": Alias("google/gemma-3-4b-it", "gemma3", _RANDOM, ("sliding layers", "two-way pictures")),
    "paligemma2": Alias(
        "google/paligemma2-3b-mix-224", "paligemma", _RANDOM, ("sliding layers", "two-way prefix", "soft cap")
    ),
    "mistral3": Alias("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3", _RANDOM, ("own grid",)),
    "aya-vision": Alias("CohereLabs/aya-vision-8b", "aya_vision", _RANDOM, ("tiles", "sliding layers")),
}


def is_tested(family: str) -> bool:
    """Whether models of this family (`model_type`) are run by the tests of this project."""
    return any(alias.family == family and alias.tested != _UNTESTED for alias in ALIASES.values())
