"""Known answers scored token by token, for models whose layers no single pass over an answer serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from avlprof.attention.gate import governed_layers, head_size
from avlprof.attention.modality import modality_map, prompt_shapes, vision_token_ids
from avlprof.models.generation import greedy
from avlprof.policy import DENSE, Policy, PromptShape, scale_group
from avlprof.runtime.apply import apply
from avlprof.runtime.cuts import Cut, cutting
from avlprof.runtime.forced.score import ForcedScore, Head, HeadInput, check_finite, closeness, scores_of


class SteppedBatch:
    """As a `ForcedBatch` for any model that the runtime serves: a state has to see token after token.

    Each policy or cut costs a generation of the answers, prompts included; nothing is held between them
    but the dense model's last hidden states. `reference` and `within` as of a `ForcedBatch`.
    """

    nbytes = parked = 0

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        answers: Sequence[Sequence[int]],
        *,
        head: Head | None = None,
        reference: SteppedBatch | None = None,
        within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self.model, self.inputs, self.answers = model, inputs, answers
        self._reference, self._within = reference, within
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        text = model.config.get_text_config(decoder=True)
        modality = modality_map(ids, mask, vision_token_ids(model.config))
        self.shapes: list[PromptShape] = prompt_shapes(
            modality, governed_layers(text), scale_group(head_size(text))
        )
        self.lengths = [len(answer) for answer in answers]
        self._head = head or Head(model)
        width = max([*self.lengths, 1])
        self._tokens = torch.tensor([[*answer, *[0] * (width - len(answer))] for answer in answers])
        self._tokens = self._tokens.to(ids.device)
        lengths = torch.tensor(self.lengths, device=ids.device)
        self._real = torch.arange(width, device=ids.device) < lengths[:, None]
        self._dense: Tensor | None = None

    def forget(self) -> None:
        """Nothing is held."""

    def drop(self) -> None:
        """Nothing is held that could be dropped."""

    def park(self) -> None:
        """Nothing is held that could wait on the host."""

    @torch.inference_mode()
    def logits(self, policy: Policy) -> Tensor:
        """Logits `[B, T, V]` of the steps behind each answer token; zeros behind an answer's end."""
        steps = self._real[:, 1:]
        logits = torch.zeros(*steps.shape, self._head.vocabulary, device=steps.device)
        logits[steps] = self._head.logits(self._hidden(policy)[:, 1:][steps])
        return logits

    def score(self, policy: Policy, samples: Sequence[str]) -> list[ForcedScore]:
        """Compare a policy with dense on every row; `samples` are the rows' ids."""
        return self.score_many([policy], samples)[0]

    def score_cuts(self, cuts: Sequence[Cut], samples: Sequence[str]) -> list[list[ForcedScore]]:
        """As `score_many`."""
        return self.score_many(cuts, samples)

    @torch.inference_mode()
    def score_many(self, policies: Sequence[Policy | Cut], samples: Sequence[str]) -> list[list[ForcedScore]]:
        """Compare policies or cuts with dense on every row, `[policy][row]`, one after the other."""
        dense = self._dense_hidden()
        targets, owners = self._tokens[self._real], self._real.nonzero()[:, 0]
        sums = torch.zeros((3, len(policies), len(self.lengths)), device=targets.device)
        for number, policy in enumerate(policies):
            ours = self._hidden(policy)[self._real]
            close = closeness(self._head, dense, ours[None], targets)
            sums[:, number] = sums[:, number].index_add(1, owners, close[:, 0])
        with self._within():
            check_finite(self.model, self.inputs, sums[0], policies, samples)
        return scores_of(sums, samples, self.lengths)

    def _under(self, policy: Policy | Cut) -> Any:
        """The context in which the model runs so."""
        if isinstance(policy, Cut):
            return cutting(self.model, policy)
        return contextlib.nullcontext() if policy is DENSE else apply(self.model, policy)

    def _dense_hidden(self) -> Tensor:
        """The dense model's last hidden states `[R, D]` of all answer tokens."""
        if self._reference is not None:
            return self._reference._dense_hidden()
        if self._dense is None:
            self._dense = self._hidden(DENSE)[self._real]
        return self._dense

    def _hidden(self, policy: Policy | Cut) -> Tensor:
        """Last hidden states `[B, T + 1, D]` that give each answer token, the first included."""
        with self._within(), self._under(policy), self._head.watched(short=True) as seen:
            said = _Said(self._tokens, seen)
            greedy(self.model, self.inputs, max_new_tokens=self._tokens.shape[1], processors=[said])
        missing = self._tokens.shape[1] - len(said.hidden)  # all rows have ended: nothing real is left
        return torch.stack([*said.hidden, *said.hidden[-1:] * missing], dim=1)


class _Said(LogitsProcessor):
    """Has the model say known tokens, and keeps the hidden states that it would have spoken from."""

    def __init__(self, tokens: Tensor, seen: HeadInput) -> None:
        self._tokens, self._seen = tokens, seen
        self.hidden: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self._seen.rows
        assert rows is not None
        token = self._tokens[:, len(self.hidden), None]
        self.hidden.append(rows[:, -1].clone())
        return torch.full_like(scores, float("-inf")).scatter(1, token.to(scores.device), 0.0)
