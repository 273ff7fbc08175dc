"""From last hidden states to how far a policy's next tokens are from the dense model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.models.finite import first_layer, named, not_finite
from avlprof.policy import Policy
from avlprof.runtime.cuts import Cut


@dataclass
class HeadInput:
    """What went into the head: of the first pass its last rows, of the latest pass everything.

    `first [B, D]`, `rows [B, T, D]`.
    """

    first: Tensor | None = None
    rows: Tensor | None = None


class Head:
    """The output embedding of a model with its soft cap or scale, if it has one.

    Logits of a whole vocabulary are large, so hidden states are kept instead and turned into logits
    block by block. Whether that gives the model's own logits is tested on the first pass that is
    watched; where it does not (a head of a kind that is not known here), the logits themselves
    stand for the hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.module: Any = model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale: float | None = getattr(config, "logit_scale", None)
        self._form: str | None = None if self.module is not None else "whole"

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[..., V]` of hidden states `[..., D]`."""
        if self._form == "whole":
            return hidden.float()
        return self._formed(hidden, self._form or "plain").float()

    @property
    def vocabulary(self) -> int:
        """Number of logits of a token."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    @contextmanager
    def watched(self, short: bool = False) -> Iterator[HeadInput]:
        """Note what the head is given; `short` spares the model all logits but one a row."""
        seen = HeadInput()

        def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            seen.rows = args[0]
            return (args[0][:, -1:], *args[1:]) if short and self._form != "whole" else None

        def after(module: Any, args: Any, output: Any) -> None:
            self._note(seen, output.logits)

        hooks = [self.model.register_forward_hook(after)]
        if self.module is not None:
            hooks.append(self.module.register_forward_pre_hook(before))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, seen: HeadInput, logits: Tensor) -> None:
        if self._form is None and seen.rows is not None:
            self._form = self._fitting(seen.rows[:, -1], logits[:, -1])
        if self._form == "whole":
            seen.rows = logits
        if seen.first is None and seen.rows is not None:
            seen.first = seen.rows[:, -1].clone()

    def _fitting(self, hidden: Tensor, logits: Tensor) -> str:
        """The form that comes nearest to the model's logits, if it is near enough for their precision."""
        theirs = logits.float()
        allowed = 1e-3 if logits.dtype == torch.float32 else 2e-2
        errors = {
            form: float((self._formed(hidden, form).float() - theirs).abs().max())
            for form in ("plain", "capped", "scaled")
        }
        best = min(errors, key=lambda form: errors[form])
        return best if errors[best] <= allowed * float(theirs.abs().max()) else "whole"

    def _formed(self, hidden: Tensor, form: str) -> Tensor:
        logits: Tensor = self.module.forward(hidden)  # not its hooks, ours among them
        if form == "capped" and self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        if form == "scaled" and self._scale is not None:
            logits = logits * self._scale
        return logits


_LOGITS = 1 << 24  # numbers of logits that exist at a time


@dataclass(frozen=True)
class ForcedScore:
    """How close a policy stays to the dense model on one sample's answer.

    Means over the answer's `tokens`, the first included, which the prompt's last row gives: `kl` is
    the Kullback-Leibler divergence from dense to policy in nat, `agreement` the share of tokens at
    which both have the same best one, `log_likelihood` the log-probability of the answer in nat.
    """

    sample: str
    kl: float
    agreement: float
    log_likelihood: float
    tokens: int

    @classmethod
    def mean(cls, sample: str, tokens: int, sums: tuple[float, float, float]) -> ForcedScore:
        """From sums over the tokens, in the order of `closeness`; no token is a perfect score."""
        kl, agree, likelihood = (value / max(tokens, 1) for value in sums)
        return cls(sample, max(kl, 0.0), agree if tokens else 1.0, likelihood, tokens)


def closeness(head: Head, dense: Tensor, ours: Tensor, targets: Tensor) -> Tensor:
    """KL from dense to policy, agreement and log-probability of the target, `[3, P, R]`.

    Logits are formed block by block, so memory does not grow with tokens times vocabulary.

    Args:
        head: turns last hidden states into logits.
        dense: `[R, D]`, the dense model's.
        ours: `[P, R, D]`, those of P policies at the same tokens.
        targets: `[R]` the token that follows each of them.
    """
    sums = dense.new_zeros((3, *ours.shape[:2]), dtype=torch.float32)
    size = max(_LOGITS // (head.vocabulary * (ours.shape[0] + 1)), 1)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        reference = head.logits(dense[part]).log_softmax(dim=-1)
        policy = head.logits(ours[:, part]).log_softmax(dim=-1)
        index = targets[part].expand(ours.shape[0], -1)[..., None]
        sums[0, :, part] = (reference.exp() * (reference - policy)).sum(dim=-1)
        sums[1, :, part] = (policy.argmax(dim=-1) == reference.argmax(dim=-1)).float()
        sums[2, :, part] = policy.gather(-1, index)[..., 0]
    return sums


def check_finite(
    model: Any,
    inputs: dict[str, Tensor],
    kl: Tensor,
    policies: Sequence[Policy | Cut],
    samples: Sequence[str],
) -> None:
    """`UserError` where a divergence `[P, B]` of policies or cuts on the prompts `inputs` is not finite."""
    broken = (~kl.isfinite()).nonzero().tolist()
    if broken:
        number, row = broken[0]
        layer = first_layer(model, inputs)
        since = "" if layer is None else f", from layer {layer} on,"
        under = f" under policy '{policies[number].name}'" if layer is None else ""
        raise not_finite(f"the logits of {named(samples, row)}{under}{since}")


def scores_of(sums: Tensor, samples: Sequence[str], lengths: Sequence[int]) -> list[list[ForcedScore]]:
    """Scores `[policy][row]` of sums `[3, P, B]` over the answers' tokens, `lengths` of them."""
    return [
        [ForcedScore.mean(*row) for row in zip(samples, lengths, by_row, strict=True)]
        for by_row in sums.permute(1, 2, 0).tolist()
    ]
