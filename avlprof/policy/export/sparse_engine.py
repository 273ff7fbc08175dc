"""A module for SparseEngine: each layer's budget as a ratio of its PyramidKV, sinks and recent tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType

from avlprof.errors import UserError
from avlprof.policy.export._base import Case, Target, head, listed, ranking
from avlprof.policy.sizes import LayerSizes

COMMIT = "4597068"


class SparseEngine(Target):
    """Tokens of all kinds compete in it, so the prompt's system text becomes its sinks and the text behind
    the picture its recent tokens: what competes is then the picture, for prompts of this shape.

    The engine keeps `sink + int(decode_keep * ratio / first ratio) + recent` tokens of a layer.
    """

    name = "sparse-engine"
    source = (
        f"SparseEngine (GitHub CURRENTF/SparseEngine at {COMMIT}: configs/sparse.py, configs/groups.py, "
        "engine/sparse_methods/snapkv.py); not run: it needs a GPU"
    )
    suffix = ".py"
    expresses = MappingProxyType(
        {
            "pool": None,
            "vision_keep": None,
            "joint.keep": None,
            "joint.sink": None,
            "joint.recent": None,
            "joint.recent_share": None,
            "joint.decoding": None,
            "scorer.name": None,
            "scorer.options": None,
        }
    )
    says = dict.fromkeys(
        ("text.window", "text.sink", "text.heavy", "text.keep", "text.minimum", "text.recent", "text.scorer"),
        "of the prompt's text as many of the newest tokens stay; while answering none goes by it",
    )

    def check(self, case: Case) -> None:
        prompt, kept = case.counted(self.name)
        own = [kept[layer] for layer in case.governed]
        if not own or all(size.stored >= prompt.total for size in own):
            raise UserError(
                f"policy '{case.policy.name}' keeps every token of this prompt, and dropping tokens is all "
                "that SparseEngine is asked to do: nothing of it would be left"
            )

    def lost(self, case: Case) -> Iterator[str]:
        prompt, kept = case.counted(self.name)
        yield from super().lost(case)
        sink, recent = _ends(case)
        own = [kept[layer] for layer in case.governed]
        wanted = [size.stored for size in own]
        got = engine_budgets(*_numbers(own, sink, recent))
        other = [
            f"{a} for {b} in layer {layer}"
            for layer, a, b in zip(case.governed, got, wanted, strict=True)
            if a != b
        ]
        if other:
            yield f"kept tokens: the first layer has one token at least that competes: {', '.join(other)}"
        yield (
            f"scorer: {ranking(case.policy)}: the engine ranks by the attention of the newest rows of the "
            "prompt (32 by default), the largest over heads"
        )
        if case.policy.joint is None:
            yield (
                f"shares: counts are fixed at those of a prompt of {prompt.total} tokens; of longer ones "
                "less is kept, and pictures in the middle of text compete with it"
            )
        yield "answers: every 1024 generated tokens a layer is cut back to its budget, in which they compete"

    def write(self, case: Case, lost: tuple[str, ...]) -> str:
        _, kept = case.counted(self.name)
        sink, recent = _ends(case)
        own = [kept[layer] for layer in case.governed]
        _, keep, ratios, _ = _numbers(own, sink, recent)
        layers = ", ".join(map(str, case.governed))
        lines = [
            '"""' + "\n".join(head(case, self, lost)) + '\n"""',
            "",
            "from sparseengine import LLM",
            "",
            "CONFIG = {",
        ]
        lines += [
            '    "sparse_method": "pyramidkv",',
            f'    "sink_keep_tokens": {sink},',
            f'    "recent_keep_tokens": {recent},',
            f'    "decode_keep_tokens": {keep},',
            f'    "pyramid_layer_ratios": {listed(ratios, 4)},',
            '    "enable_multimodal": True,',
            "}",
            f"KEPT = {listed(engine_budgets(sink, keep, ratios, recent))}",
            f'"""Tokens kept of the prompt in layers {layers}."""',
            "",
            "",
            "def engine(model: str, **options: object) -> LLM:",
            '    """The engine for a checkpoint, with the budget of each layer; options are its own."""',
            "    return LLM(model, **CONFIG, **options)",
            "",
        ]
        return "\n".join(lines)


def engine_budgets(sink: int, keep: int, ratios: Sequence[float], recent: int) -> list[int]:
    """Tokens that the engine keeps in each layer: its own formula."""
    return [sink + int(keep * ratio / ratios[0]) + recent for ratio in ratios]


def _ends(case: Case) -> tuple[int, int]:
    """Tokens that stay at the beginning and the end of every layer: system and text, or those of a pool."""
    prompt, kept = case.counted(SparseEngine.name)
    joint = case.policy.joint
    if joint is None:
        return prompt.system, min(kept[layer].text for layer in case.governed)
    least = min(kept[layer].stored for layer in case.governed)
    sink = min(joint.sink, least)
    return sink, min(joint.newest(least), least - sink)


def _numbers(own: Sequence[LayerSizes], sink: int, recent: int) -> tuple[int, int, list[float], int]:
    """Sinks, tokens that compete, a ratio a layer in (0, 1], and recent tokens.

    Ratios are of half a token more than a layer's, so that `int` does not fall below by rounding. The
    first layer's is the measure of all, and has one competing token at least.
    """
    compete = [max(size.stored - sink - recent, 0) for size in own]
    first = max(compete[0], 1)
    most = max([first, *(count + 0.5 for count in compete[1:])])
    scale = 2.0 ** -int(most).bit_length()  # a power of two, which divides without rounding
    ratios = [first * scale, *((count + 0.5) * scale for count in compete[1:])]
    return sink, first, ratios, recent
