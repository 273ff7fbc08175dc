"""A plain, slow, dense oracle of a policy: eager attention, explicit masks, no cache.

One unpadded row at a time. The whole sequence is recomputed in one forward; in each layer the
rows behind the prompt are processed in order, each with its own mask, exactly as the A-VL paper's
algorithm words it. Nothing of avlprof's runtime is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from avlprof.policy import Policy


@dataclass
class Trace:
    """What the oracle chose: per layer the kept set, and per step the core set; score gaps."""

    kept: dict[int, list[set[int]]] = field(default_factory=dict)
    cores: dict[int, list[list[set[int]]]] = field(default_factory=dict)
    gap: float = math.inf  # smallest relative gap between the last chosen and the first left out


def top(scores: list[float], candidates: list[int], count: int, trace: Trace) -> set[int]:
    """The `count` best candidates, lower position first on ties."""
    ranked = sorted(candidates, key=lambda i: (-scores[i], i))
    if 0 < count < len(ranked):
        last, left = scores[ranked[count - 1]], scores[ranked[count]]
        trace.gap = min(trace.gap, (last - left) / last)
    return set(ranked[:count])


def per_layer(value, layer):
    return value[layer] if isinstance(value, tuple) else value


class Oracle:
    """Eager attention of one row under a policy; `vision` and `system` come from the prompt.

    `answer_types` are the token types that the model gives to generated tokens. The prompt attends
    by the model's own mask where it makes one; sliding layers do so throughout.
    """

    def __init__(
        self, model, policy: Policy, vision_ids: tuple[int, ...], answer_types: dict[str, int] | None = None
    ) -> None:
        self.model, self.policy, self.vision_ids = model, policy, vision_ids
        self.answer_types = {"mm_token_type_ids": 0} | (answer_types or {})

    def run(self, inputs: dict[str, Tensor], answer: list[int]) -> tuple[Tensor, Trace]:
        """Logits `[len(answer) + 1, V]` of the tokens behind the prompt, and the sets."""
        prompt = inputs["input_ids"][0].tolist()
        self.length = len(prompt)
        self.vision = [i for i, t in enumerate(prompt) if t in self.vision_ids]
        first = self.vision[0] if self.vision else self.length
        self.system = list(range(first))
        self.trace = Trace()
        full = dict(inputs)
        full["input_ids"] = torch.tensor([prompt + answer])
        full["attention_mask"] = torch.ones_like(full["input_ids"])
        for name, kind in self.answer_types.items():
            if name in full:
                extra = torch.full((1, len(answer)), kind)
                full[name] = torch.cat([full[name], extra], dim=1)
        AttentionInterface.register("test_oracle", self._attention)
        AttentionMaskInterface.register("test_oracle", sdpa_mask)
        before = self.model.config.get_text_config()._attn_implementation
        self.model.set_attn_implementation({"text_config": "test_oracle"})
        try:
            with torch.no_grad():
                logits = self.model(**full, use_cache=False).logits[0, self.length - 1 :]
        finally:
            self.model.set_attn_implementation({"text_config": before})
        return logits, self.trace

    def _attention(self, module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        layer = module.layer_idx
        heads, groups = query.shape[1], key.shape[1]
        k = key.repeat_interleave(heads // groups, dim=1)[0].double()
        v = value.repeat_interleave(heads // groups, dim=1)[0].double()
        q = query[0].double()
        total = q.shape[1]
        logits = q @ k.mT * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        out = torch.zeros(heads, total, v.shape[-1], dtype=torch.double)
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = attention_mask[0, 0]
        if getattr(module, "sliding_window", None) is not None:
            out = logits.masked_fill(~seen, -math.inf).softmax(-1) @ v
            return out.transpose(0, 1)[None].to(query.dtype), None
        weights = logits[:, : self.length].masked_fill(~seen[: self.length], -math.inf).softmax(-1)
        out[:, : self.length] = weights @ v
        self._scan(layer, heads // groups, logits, weights, v, out)
        return out.transpose(0, 1)[None].to(query.dtype), None

    def _scan(self, layer, size, logits, weights, v, out):
        policy, trace = self.policy, self.trace
        heads, total = logits.shape[0], logits.shape[1]
        shared = policy.heads == "shared"
        groups = [list(range(heads))] if shared else [list(range(g, g + size)) for g in range(0, heads, size)]
        count = len(self.vision)
        keep = math.floor(per_layer(policy.vision_keep, layer) * count + 1e-6)
        compute = policy.vision_keep if policy.vision_compute is None else policy.vision_compute
        core_size = math.floor(per_layer(compute, layer) * count + 1e-6)
        scores = self._scores(weights)
        kept = [top(scores[g].mean(0).tolist(), self.vision, keep, trace) for g in groups]
        core = [
            top(scores[g].mean(0).tolist(), sorted(k), core_size, trace)
            for g, k in zip(groups, kept, strict=True)
        ]
        trace.kept[layer] = kept
        trace.cores[layer] = [core]
        text = [i for i in range(len(self.system), self.length) if i not in set(self.vision)]
        for t in range(self.length, total):
            step = t - self.length + 1
            text.append(t)
            refresh = policy.refresh_interval > 0 and step % policy.refresh_interval == 0
            refresh = refresh and core_size < keep
            seen = []
            for g, members in enumerate(groups):
                vision = kept[g] if refresh else core[g]
                visible = sorted({*self.system, *vision, *self._text(text, layer)})
                rows = logits[members, t][:, visible].softmax(-1)
                for row, head in zip(rows, members, strict=True):
                    out[head, t] = row @ v[head, visible]
                spread = torch.zeros(total, dtype=torch.double)
                spread[visible] = rows.mean(0)
                seen.append(spread.tolist())
            if refresh:
                core = [top(s, sorted(k), core_size, trace) for s, k in zip(seen, kept, strict=True)]
            trace.cores[layer].append(core)

    def _text(self, text, layer):
        window = self.policy.text.window
        if window is None:
            return text
        sink = per_layer(self.policy.text.sink, layer)
        rest = text[sink:]
        return text[:sink] + rest[-per_layer(window, layer) :]

    def _scores(self, weights):
        name = self.policy.scorer.name
        if name == "last_query":
            return weights[:, self.length - 1]
        if name == "accumulated":
            return weights.sum(1)
        if name == "position":
            return torch.arange(weights.shape[-1], dtype=torch.double).expand(weights.shape[0], -1)
        raise AssertionError(name)
