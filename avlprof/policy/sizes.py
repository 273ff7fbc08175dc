"""How many tokens a policy keeps and reads: the one place where ratios become counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from avlprof.errors import UserError
from avlprof.policy.parts import FULL, PicturePolicy, Refresh, broadcast, of_layer
from avlprof.policy.schema import Policy

GROUP = 32
"""Neighbouring numbers of a head that share a scale and an offset where vision is stored in few bits."""

Grid = tuple[int, int]
"""Rows and columns of one picture's vision tokens."""


@dataclass(frozen=True)
class PromptShape:
    """Token counts of one prompt by modality, and the layers whose KV of it is counted.

    `governed` are the layers that policies act on, where a model has others too, which keep a window,
    a state or other layers' keys; None means all. Budgets, shares and bytes are of these layers alone.
    `group` numbers of a head share a scale where vision is stored in few bits (`scale_group`).

    `grids` are those of its pictures, where they are known: policies that make pictures smaller are counted
    by them. Where the prompt has been made shorter so, `vision` are the tokens left and `whole` those of the
    pictures as they are.
    """

    system: int
    vision: int
    text: int
    governed: tuple[int, ...] | None = None
    group: int = GROUP
    grids: tuple[Grid, ...] | None = None
    whole: int | None = None

    @property
    def total(self) -> int:
        """All tokens of the prompt with its pictures as they are: what the dense cache stores a layer."""
        return self.system + (self.vision if self.whole is None else self.whole) + self.text

    @property
    def tokens(self) -> int:
        """All tokens that the prompt has."""
        return self.system + self.vision + self.text

    def shrunk(self, pictures: PicturePolicy | None) -> PromptShape:
        """The prompt as it is with smaller pictures.

        Raises:
            UserError: the grids of its pictures are not known.
        """
        if pictures is None or pictures.share >= 1.0:
            return self
        if self.grids is None:
            raise UserError(
                f"tokens of smaller pictures ({pictures.kind} to {pictures.share:g}) cannot be counted: "
                "these prompts' pictures are not at hand; 'avlprof evaluate' and 'compare' open them"
            )
        left = sum(math.prod(smaller_grid(*grid, pictures.share)) for grid in self.grids)
        return replace(self, vision=left, whole=self.vision, grids=None)

    def layers(self, layers: int) -> tuple[int, ...]:
        """The layers whose KV is counted, of a model of `layers`."""
        return tuple(range(layers)) if self.governed is None else self.governed


@lru_cache(maxsize=1 << 14)
def smaller_grid(rows: int, columns: int, share: float) -> Grid:
    """The grid of at most `share` of `rows x columns` tokens, at least one, that is even along both axes.

    Of all that fit, the one whose coarser axis is the finest, and of those the one of most tokens. A
    quarter of an even grid is its 2 x 2 means.
    """
    most = max(int(share * rows * columns + 1e-6), 1)
    fitting = [(height, min(columns, most // height)) for height in range(1, min(rows, most) + 1)]
    return max(fitting, key=lambda grid: (min(grid[0] / rows, grid[1] / columns), grid[0] * grid[1]))


def scale_group(size: int) -> int:
    """Numbers of a head of `size` that share a scale where they are stored in few bits.

    32 where that divides the head; else the largest divisor below it, so that groups are even.
    """
    return next(group for group in range(min(GROUP, size), 0, -1) if size % group == 0)


def counted_layers(prompts: Sequence[PromptShape], layers: int) -> tuple[int, ...]:
    """The layers whose KV is counted: the same ones for all prompts of a model."""
    return prompts[0].layers(layers) if prompts else tuple(range(layers))


def acts_on(policy: Policy) -> tuple[int, ...] | None:
    """The layers that a policy acts on, as its provenance says, where its model has others too; None: all."""
    return policy.provenance.governed if policy.provenance else None


def said_governed(governed: tuple[int, ...] | None, layers: int) -> str:
    """Which layers budgets and shares are of, in words; empty where they are of all."""
    if governed is None:
        return ""
    if not governed:
        return f"policies act on none of the {layers} layers"
    listed = ", ".join(str(layer) for layer in governed)
    return (
        f"budgets and shares are of the KV of {len(governed)} of {layers} layers ({listed}); the others "
        "keep a window, a state or other layers' keys, which policies leave as they are"
    )


@dataclass(frozen=True)
class LayerSizes:
    """Prompt tokens of one layer after prefill, per KV head.

    `vision` are kept, `core` of them are attended to at an ordinary step; in a joint pool
    everything is counted as `text`. `packed` of the kept ones are stored in few bits: they take `share` of
    what they would in 16, scales included, and system and text take `text_share`.
    """

    system: int
    vision: int
    core: int
    text: int
    packed: int = 0
    share: float = 1.0
    text_share: float = 1.0

    @property
    def stored(self) -> int:
        """Prompt tokens in memory."""
        return self.system + self.vision + self.text

    @property
    def read(self) -> int:
        """Prompt tokens attended to at an ordinary step."""
        return self.system + self.core + self.text

    @property
    def live(self) -> float:
        """Prompt KV in memory, in tokens of 16 bits: what a budget counts."""
        return self.stored - self.packed * (1.0 - self.share) - self._spared

    @property
    def reads(self) -> float:
        """Prompt KV attended to at an ordinary step, in tokens of 16 bits."""
        packed = max(self.packed + self.core - self.vision, 0)  # none where there is a core beside them
        return self.read - packed * (1.0 - self.share) - self._spared

    @property
    def _spared(self) -> float:
        """What few bits spare of system and text."""
        return (self.system + self.text) * (1.0 - self.text_share)


NOTHING = LayerSizes(0, 0, 0, 0)


def tokens(ratio: float, count: int) -> int:
    """`floor(ratio * count + 1e-6)`: the tokens that a kept share of `count` tokens means."""
    return int(ratio * count + 1e-6)


def sizes(policy: Policy, prompt: PromptShape, layers: int) -> list[LayerSizes]:
    """Token counts of every layer right after prefill, for one prompt.

    Runtime, allocators and accounting all use this function. Vision counts are capped by
    what a prefill filter left for the layer. A layer that is not counted has none.

    Raises:
        UserError: the policy is for another number of layers, or as `PromptShape.shrunk`.
    """
    policy.check_layers(layers)
    prompt = prompt.shrunk(policy.pictures)
    counted = prompt.layers(layers)
    whole = _sizes(policy, prompt, layers)
    return [size if layer in counted else NOTHING for layer, size in enumerate(whole)]


def _sizes(policy: Policy, prompt: PromptShape, layers: int) -> list[LayerSizes]:
    if policy.joint is not None:
        shares = broadcast(policy.joint.keep, layers)
        return [
            LayerSizes(0, 0, 0, min(prompt.tokens, max(tokens(share, prompt.tokens), 1))) for share in shares
        ]
    cored = policy.vision_compute is not None
    counts = []
    for layer, (keep, compute, here, bits, text_bits) in enumerate(
        zip(
            policy.keep(layers),
            policy.compute(layers),
            vision_left(policy, prompt.vision, layers),
            policy.bits(layers),
            policy.text_bits(layers),
            strict=True,
        )
    ):
        vision = min(tokens(keep, prompt.vision), here)
        core = min(tokens(compute, prompt.vision), vision)
        text = min(prompt.text, text_room(policy, prompt.text, 0, layer)[0])
        packed = 0 if bits == FULL else vision - cored * core
        share, text_share = packed_share(bits, prompt.group), packed_share(text_bits, prompt.group)
        counts.append(LayerSizes(prompt.system, vision, core, text, packed, share, text_share))
    return counts


def packed_share(bits: int, group: int = GROUP) -> float:
    """What a number of `bits` bits takes over one of 16, with its part of a scale and an offset."""
    return 1.0 if bits == FULL else (bits + 2 * FULL / group) / FULL


def vision_left(policy: Policy, vision: int, layers: int) -> list[int]:
    """Vision tokens that enter each layer: fewer behind every step of a prefill filter."""
    left = []
    here = vision
    for layer in range(layers):
        for step in policy.prefill_filter:
            if step.after_layer == layer:
                here = min(here, tokens(step.keep, vision))
        left.append(here)
    return left


def live_share(policy: Policy, prompts: Sequence[PromptShape], layers: int) -> float:
    """The budget a policy uses: prompt KV live after prefill over the dense cache's.

    Summed over prompts and the layers that are counted, which have one head size, so that tokens
    of 16 bits are bytes.
    """
    stored = sum(size.live for prompt in prompts for size in sizes(policy, prompt, layers))
    return stored / dense_tokens(prompts, layers)


def dense_tokens(prompts: Sequence[PromptShape], layers: int) -> int:
    """Prompt tokens that the dense cache stores in all layers that are counted.

    Raises:
        UserError: none is, since no policy acts on any layer of the model.
    """
    total = sum(len(prompt.layers(layers)) * prompt.total for prompt in prompts)
    if not total and prompts and not counted_layers(prompts, layers):
        raise UserError("policies act on no layer of this model, so no KV is counted; it can be traced")
    return total


def read_share(
    policy: Policy,
    prompts: Sequence[PromptShape],
    layers: int,
    answer_tokens: int,
    refreshed: Sequence[float] | None = None,
) -> float:
    """Mean prompt KV read per decoding step, refreshes included, over the dense cache's.

    `answer_tokens` is the number of decoding steps (forward passes after prefill). Text that
    generated tokens push out of a window is no longer read as prompt; where scores decide what
    goes, as much of the prompt stays as can. A refresh that only scores reads keys, half the bytes, and a
    layer that follows another reads nothing. `refreshed` is the share of steps that refresh where these are
    triggered, layer by layer, as measured; without it they are as many as there can be.
    """
    steps = max(answer_tokens, 1)
    share = refresh_reads(policy.refresh)
    most = [refreshes(steps, policy.refresh_interval, policy.refresh)] * layers
    if policy.triggered and refreshed is not None:
        most = [min(rate * steps, limit) for rate, limit in zip(refreshed, most, strict=True)]
    read = 0.0
    for prompt in prompts:
        gone = _text_pushed_out(policy, prompt, layers, steps)
        for layer, (size, pushed) in enumerate(zip(sizes(policy, prompt, layers), gone, strict=True)):
            count = most[layer] if size.core < size.vision and policy.leader(layer) == layer else 0
            read += steps * size.reads + count * share * (size.live - size.reads) - pushed
    return read / (steps * dense_tokens(prompts, layers))


def refreshes(steps: int, interval: int, kind: Refresh) -> float:
    """How often a core is picked anew in so many decoding steps; at most, where refreshes are triggered."""
    if not interval:
        return 0
    return 1 + (steps - 1) // interval if kind == "triggered" else steps // interval


def refresh_reads(kind: Refresh) -> float:
    """What a refresh reads of a token that is kept and not core: its key alone is half."""
    return 1.0 if kind == "full" else 0.5


def _text_pushed_out(policy: Policy, prompt: PromptShape, layers: int, steps: int) -> list[int]:
    """Per layer, prompt text tokens that are missing at a step, summed over the steps; at least."""
    if policy.evicts_by is None:
        return [0] * layers
    kept = [size.text for size in sizes(policy, prompt, layers)]
    return [_pushed_out(policy, prompt, layer, count, steps) for layer, count in enumerate(kept)]


def _pushed_out(policy: Policy, prompt: PromptShape, layer: int, kept: int, steps: int) -> int:
    """One layer of `_text_pushed_out`: of the `kept` tokens of the prompt, those that must go."""
    gone = 0
    for step in range(1, steps + 1):
        limit, newest = text_room(policy, prompt.text + step, kept, layer)
        gone += kept - min(kept, max(limit - min(newest, step), 0))
    return gone


def text_room(policy: Policy, seen: int, pool: int, layer: int) -> tuple[int, int]:
    """Most tokens that the text part of a layer holds, and how many of them are the newest.

    Args:
        seen: text and generated tokens that have passed; not used for a joint pool.
        pool: tokens of the prompt that the part holds after prefill, for a joint pool.
        layer: index of the layer, for policies with one value a layer.
    """
    if policy.joint is not None:
        sink = min(policy.joint.sink, pool)
        limit = max(pool, sink + 1)
        return limit, limit - sink if policy.evicts_by == "position" else policy.joint.newest(limit)
    text = policy.text
    if text.keep is not None:
        limit = max(round(of_layer(text.keep, layer) * seen), text.minimum)
        return limit, int(text.recent * limit + 1e-6) if text.scored else limit
    if text.window is None:
        return seen, seen
    window = of_layer(text.window, layer)
    return of_layer(text.sink, layer) + of_layer(text.heavy, layer) + window, window
