"""A file for TensorRT-LLM: a window a layer, for policies that keep the newest tokens."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from avlprof.errors import UserError
from avlprof.policy.export._base import Case, Target, head, listed
from avlprof.policy.parts import of_layer

BLOCK = 32
"""Tokens of a block of its cache by default: a window holds whole ones."""
FULL = 1 << 20
"""Stands for no window: the engine cuts it to the longest sequence."""


class TensorRTLLM(Target):
    """The engine keeps the first and the newest tokens of a layer and ranks none, so what ranks is refused.

    What is left: pools and kept vision ranked by `position`, layers that keep all of the picture or none,
    and text windows beside a whole picture, which then belongs to the first tokens.
    """

    name = "tensorrt-llm"
    source = (
        "TensorRT-LLM (GitHub NVIDIA/TensorRT-LLM at 0076e93: docs/source/features/kvcache.md; "
        "llmapi/llm_args.py, KvCacheConfig); not run: it needs a GPU"
    )
    suffix = ".yaml"
    expresses = MappingProxyType(
        {
            "pool": None,
            "vision_keep": None,
            "scorer.name": None,
            "scorer.options": None,
            "heads": ("shared", "kv_head"),
            "joint.keep": None,
            "joint.sink": None,
            "joint.recent": None,
            "joint.recent_share": None,
            "joint.decoding": ("evict",),
            "text.window": None,
            "text.sink": None,
        }
    )
    says = MappingProxyType(
        {"joint.decoding": "each generated token pushes the oldest one out of a layer's window"}
    )

    def check(self, case: Case) -> None:
        policy = case.policy
        prompt, kept = case.counted(self.name)
        own = {layer: kept[layer] for layer in case.governed}
        windowed = not policy.text.keeps_all
        if not windowed and all(size.stored >= prompt.total for size in own.values()):
            raise UserError(
                f"policy '{policy.name}' keeps every token of this prompt, and windows are all that "
                "TensorRT-LLM has: nothing of it would be left"
            )
        some = [layer for layer, size in own.items() if 0 < size.vision < prompt.vision]
        if policy.scorer.name != "position" and (some or policy.joint is not None):
            raise UserError(
                f"policy '{policy.name}' keeps the best tokens by '{policy.scorer.name}', and TensorRT-LLM "
                "keeps the newest of a layer and ranks none: nothing of it would be left; it can be given a "
                "policy with scorer: position, and kvpress can be given this one"
            )
        if (windowed and policy.text.window is None) or policy.text.scored:
            raise UserError(
                f"policy '{policy.name}' keeps text by a score or a share, and TensorRT-LLM has windows of a "
                "fixed size; give it text.window and text.sink alone"
            )
        if windowed and any(size.vision < prompt.vision for size in own.values()):
            raise UserError(
                f"policy '{policy.name}' has text windows beside layers that drop vision, and first tokens "
                "are as many in all layers of TensorRT-LLM; give it one of the two"
            )

    def lost(self, case: Case) -> Iterator[str]:
        yield from super().lost(case)
        policy = case.policy
        if policy.joint is None and policy.text.keeps_all:
            yield "answers: each generated token pushes the oldest one out of a layer's window, vision first"
        if isinstance(policy.text.sink, tuple) and len(set(policy.text.sink)) > 1:
            yield "text.sink: the least of all layers; what a layer has more is in its window"
        others = [layer for layer in range(case.layers) if layer not in case.governed]
        if others:
            yield f"layers {', '.join(map(str, others))}: have no window here; put their own in its place"
        yield (
            "sink_token_length: is read by the cache manager in C++ (use_kv_cache_manager_v2: false); the "
            "other manager keeps no first tokens"
        )
        yield f"memory: blocks of {BLOCK} tokens are freed whole, so up to {BLOCK - 1} more stay a layer"

    def write(self, case: Case, lost: tuple[str, ...]) -> str:
        lines = [f"# {line}".rstrip() for line in head(case, self, lost)]
        lines += [
            "#",
            "# trtllm-serve MODEL --config THIS_FILE",
            "kv_cache_config:",
            "  use_kv_cache_manager_v2: false",
            "  enable_block_reuse: false",
            f"  sink_token_length: {first_tokens(case)}",
            f"  max_attention_window: {listed(windows(case), 2)}",
        ]
        return "\n".join(lines) + "\n"


def first_tokens(case: Case) -> int:
    """Tokens that stay at the beginning of every layer: a pool's, system text, or all up to the text."""
    prompt, _ = case.counted(TensorRTLLM.name)
    policy = case.policy
    if policy.joint is not None:
        return policy.joint.sink
    if policy.text.keeps_all:
        return prompt.system
    return prompt.system + prompt.vision + min(of_layer(policy.text.sink, layer) for layer in case.governed)


def windows(case: Case) -> list[int]:
    """Tokens that each layer holds, the first ones included; `FULL` where it drops none."""
    prompt, kept = case.counted(TensorRTLLM.name)
    text = case.policy.text
    found = [FULL] * case.layers
    for layer in case.governed:
        if text.window is not None:
            extra = of_layer(text.sink, layer) + of_layer(text.window, layer)
            found[layer] = prompt.system + prompt.vision + extra
        elif kept[layer].stored < prompt.total:
            found[layer] = kept[layer].stored
    return found
