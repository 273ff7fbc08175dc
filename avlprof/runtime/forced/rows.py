"""The answer rows of one layer, beside the prompts that they look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.runtime.forced.prompt import PromptLayer

_WEIGHTS = 1 << 20  # attention weights that exist at a time: few enough for a CPU cache


class AnswerRows:
    """Queries, keys and values of all answer rows of `P` policies.

    The model's batch holds the policies of the first prompt, then those of the second. Here they are
    an axis of their own, `[B, Hkv, P, g, T, D]` with `g` query heads in a group, so that one product
    serves all policies of a prompt and the prompt's keys are never repeated.
    """

    def __init__(self, call: AttentionCall, prompt: PromptLayer, policies: int) -> None:
        self.call, self.prompt = call, prompt
        batch, groups = prompt.key.shape[:2]
        query, key, value = (
            states.reshape(batch, policies, groups, -1, *states.shape[2:])
            for states in (call.query, call.key, call.value)
        )
        self.query = query.permute(0, 2, 1, 3, 4, 5).float()
        self.key, self.value = (states[:, :, :, 0].transpose(1, 2).float() for states in (key, value))
        self._key, self._value = prompt.key.float(), prompt.value.float()
        self.length, self.steps = prompt.key.shape[2], call.key.shape[2]

    @property
    def columns(self) -> int:
        """Prompt tokens and answer tokens: what a row can look at."""
        return self.length + self.steps

    def blocks(self, rows: range) -> Iterator[range]:
        """Parts of `rows` whose weights may exist at a time."""
        batch, groups, policies, heads = self.query.shape[:4]
        size = max(_WEIGHTS // (batch * groups * policies * heads * self.columns), 1)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def logits(self, rows: range) -> Tensor:
        """Scaled products `[B, Hkv, P, g, R, N + T]` of some rows with all columns, fp32."""
        query = self.query[..., rows.start : rows.stop : rows.step, :]
        prompt = query.flatten(2, 4) @ self._key.mT
        answer = query.flatten(3, 4) @ self.key.mT
        logits = torch.cat(
            [prompt.view(*query.shape[:-1], self.length), answer.view(*query.shape[:-1], self.steps)], dim=-1
        )
        logits *= self.call.scaling
        if self.call.softcap is not None:
            logits = self.call.softcap * torch.tanh(logits / self.call.softcap)
        return logits

    def mixed(self, weights: Tensor) -> Tensor:
        """Output `[B, Hkv, P, g, R, D]` of rows with weights `[B, Hkv, P, g, R, N + T]`."""
        prompt = weights[..., : self.length].flatten(2, 4) @ self._value
        answer = weights[..., self.length :].flatten(3, 4) @ self.value
        return prompt.view(*weights.shape[:-1], -1) + answer.view(*weights.shape[:-1], -1)

    def joined(self, blocks: list[Tensor]) -> Tensor:
        """The blocks' outputs as the model takes them: `[B * P, T, H, D]`."""
        out = torch.cat(blocks, dim=4) if len(blocks) > 1 else blocks[0]
        return out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 1).to(self.call.query.dtype)
