"""How many tokens a policy keeps and reads: the one place where ratios become counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avlprof.policy.schema import Policy, broadcast


@dataclass(frozen=True)
class PromptShape:
    """Token counts of one prompt by modality."""

    system: int
    vision: int
    text: int

    @property
    def total(self) -> int:
        """All prompt tokens: what the dense cache stores a layer."""
        return self.system + self.vision + self.text


@dataclass(frozen=True)
class LayerSizes:
    """Prompt tokens of one layer after prefill, per KV head.

    `vision` are kept, `core` of them are attended to at an ordinary step; in a joint pool
    everything is counted as `text`.
    """

    system: int
    vision: int
    core: int
    text: int

    @property
    def stored(self) -> int:
        """Prompt tokens in memory."""
        return self.system + self.vision + self.text

    @property
    def read(self) -> int:
        """Prompt tokens attended to at an ordinary step."""
        return self.system + self.core + self.text


def tokens(ratio: float, count: int) -> int:
    """`floor(ratio * count + 1e-6)`: the tokens that a kept share of `count` tokens means."""
    return int(ratio * count + 1e-6)


def sizes(policy: Policy, prompt: PromptShape, layers: int) -> list[LayerSizes]:
    """Token counts of every layer right after prefill, for one prompt.

    Runtime, allocators and accounting all use this function. Vision counts are capped by
    what a prefill filter left for the layer.
    """
    policy.check_layers(layers)
    if policy.joint is not None:
        shares = broadcast(policy.joint.keep, layers)
        return [
            LayerSizes(0, 0, 0, min(prompt.total, max(tokens(share, prompt.total), 1))) for share in shares
        ]
    present = vision_left(policy, prompt.vision, layers)
    text = [min(prompt.text, limit) for limit in text_limits(policy, prompt.text, layers)]
    return [
        LayerSizes(
            prompt.system,
            min(tokens(keep, prompt.vision), here),
            min(tokens(compute, prompt.vision), tokens(keep, prompt.vision), here),
            kept_text,
        )
        for keep, compute, here, kept_text in zip(
            policy.keep(layers), policy.compute(layers), present, text, strict=True
        )
    ]


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


def text_limits(policy: Policy, seen: int, layers: int) -> list[int]:
    """Most text and generated tokens each layer holds once `seen` of them have passed."""
    text = policy.text
    if text.keep is not None:
        return [max(round(keep * seen), text.minimum) for keep in broadcast(text.keep, layers)]
    if text.window is None:
        return [seen] * layers
    parts = (broadcast(part, layers) for part in (text.window, text.sink, text.heavy))
    return [sum(part) for part in zip(*parts, strict=True)]


def live_share(policy: Policy, prompts: Sequence[PromptShape], layers: int) -> float:
    """The budget a policy uses: prompt KV live after prefill over the dense cache's.

    Summed over prompts and layers; with one head size for all layers, tokens are bytes.
    """
    stored = sum(size.stored for prompt in prompts for size in sizes(policy, prompt, layers))
    return stored / (layers * sum(prompt.total for prompt in prompts))


def read_share(policy: Policy, prompts: Sequence[PromptShape], layers: int, answer_tokens: int) -> float:
    """Mean prompt KV read per decoding step, refreshes included, over the dense cache's.

    `answer_tokens` is the number of decoding steps (forward passes after prefill). Text that
    generated tokens push out of a window is no longer read as prompt.
    """
    steps = max(answer_tokens, 1)
    every = policy.refresh_interval
    read = 0.0
    for prompt in prompts:
        gone = _text_pushed_out(policy, prompt, layers, steps)
        for size, pushed in zip(sizes(policy, prompt, layers), gone, strict=True):
            refreshes = steps // every if every and size.core < size.vision else 0
            read += steps * size.read + refreshes * (size.vision - size.core) - pushed
    return read / (steps * layers * sum(prompt.total for prompt in prompts))


def _text_pushed_out(policy: Policy, prompt: PromptShape, layers: int, steps: int) -> list[int]:
    """Per layer, prompt text tokens missing from the window, summed over the steps."""
    if policy.joint is not None:
        if policy.joint.decoding == "grow":
            return [0] * layers
        held = [size.text for size in sizes(policy, prompt, layers)]
        safe = [policy.joint.sink] * layers
    elif policy.text.window is not None:
        held = [size.text for size in sizes(policy, prompt, layers)]
        safe = list(broadcast(policy.text.sink, layers))
    else:
        return [0] * layers
    limits = held if policy.joint is not None else text_limits(policy, prompt.text, layers)
    gone = []
    for kept, limit, sink in zip(held, limits, safe, strict=True):
        most = max(kept - sink, 0)
        gone.append(sum(min(max(kept + step - limit, 0), most) for step in range(1, steps + 1)))
    return gone
