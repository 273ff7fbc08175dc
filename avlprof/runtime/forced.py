"""Score policies without generating: one forward over a known answer per policy.

The dense model answers every sample once and its prompts are prefilled once; each policy then
costs one forward over the answers' tokens. The scores compare a policy with the dense model on
the dense model's own answer, so no labels are needed and differences between policies are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import modality_map, prompt_shapes, vision_token_ids
from avlprof.attention.rows import group_mean
from avlprof.attention.session import switched
from avlprof.models import LoadedModel
from avlprof.policy import DENSE, Policy, PromptShape, ScorerSpec
from avlprof.runtime.ends import answer_length, end_tokens
from avlprof.runtime.forced_attention import ForcedRuntime, PromptLayer
from avlprof.runtime.support import check_supported
from avlprof.scorers import Prefill, Scorer, make_scorer
from avlprof.tasks import Sample


@dataclass(frozen=True)
class ForcedScore:
    """How close a policy stays to the dense model on one sample's dense answer.

    `kl` is the mean Kullback-Leibler divergence from dense to policy in nat per decoding step,
    `agreement` the share of steps whose best token is the dense model's, `log_likelihood` the
    mean log-probability of the answer's tokens in nat, `tokens` the number of steps.
    """

    sample: str
    kl: float
    agreement: float
    log_likelihood: float
    tokens: int


class _Capture:
    """Observer that keeps every layer's prompt KV and the scores of chosen scorers."""

    def __init__(self, scorers: dict[str, Scorer]) -> None:
        self.scorers = scorers
        self.layers: list[PromptLayer] = []
        self.scores: dict[str, list[Tensor]] = {name: [] for name in scorers}

    def begin(self, forward: Forward) -> None:
        """Nothing to prepare."""

    def attended(self, forward: Forward, call: AttentionCall) -> None:
        """Keep one layer; layers come in order."""
        self.layers.append(PromptLayer(call.key, call.value))
        prefill = Prefill.of(call, forward.modality)
        for name, scorer in self.scorers.items():
            self.scores[name].append(scorer.score(prefill))


class ForcedBatch:
    """Prompts with known answers, ready to be scored under any number of policies.

    Args:
        model: the dense model.
        inputs: a left-padded batch as `generate` takes it, `input_ids [B, N]` and companions.
        answers: token ids of each row's answer, its end token included.
    """

    def __init__(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], answers: Sequence[Sequence[int]]
    ) -> None:
        self.model, self.inputs = model, inputs
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        self.modality = modality_map(ids, mask, vision_token_ids(model.config))
        self.shapes: list[PromptShape] = prompt_shapes(self.modality)
        self.steps = [max(len(answer) - 1, 0) for answer in answers]
        width = max([*self.steps, 1])
        tokens = torch.zeros(len(answers), width + 1, dtype=torch.long, device=ids.device)
        for row, answer in enumerate(answers):
            tokens[row, : len(answer)] = torch.tensor(list(answer), device=ids.device)
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:]
        self._mask = torch.cat([mask, mask.new_ones(len(answers), width)], dim=1)
        self._scores: dict[str, list[Tensor]] = {}
        self._prompts: list[PromptLayer] = []
        self._positions: Tensor | None = None
        self._dense: Tensor | None = None

    @torch.inference_mode()
    def logits(self, policy: Policy) -> Tensor:
        """Logits `[B, T, V]` of the steps behind each answer token, under a policy."""
        check_supported(policy)
        scores = self._scored(policy.scorer)
        groups = self._prompts[0].key.shape[1] if policy.heads == "kv_head" else 1
        reduced = [group_mean(s, groups) for s in scores]
        text_config = self.model.config.get_text_config(decoder=True)
        runtime = ForcedRuntime(policy, self._prompts, reduced, self.modality, text_config)
        cache = runtime.new_cache()
        with switched(self.model, runtime=runtime) as session:
            session.adopt(cache, self.modality)
            out = self.model(
                input_ids=self.tokens,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=cache,
                use_cache=True,
            )
        logits: Tensor = out.logits
        return logits

    @torch.inference_mode()
    def score(self, policy: Policy, samples: Sequence[str]) -> list[ForcedScore]:
        """Compare a policy with dense on every row; `samples` are the rows' ids."""
        if self._dense is None:
            self._dense = self.logits(DENSE).float().log_softmax(dim=-1)
        ours = self.logits(policy).float().log_softmax(dim=-1)
        kl = (self._dense.exp() * (self._dense - ours)).sum(dim=-1)
        agree = (ours.argmax(dim=-1) == self._dense.argmax(dim=-1)).float()
        likelihood = ours.gather(-1, self.targets[..., None])[..., 0]
        found = []
        for row, (sample, steps) in enumerate(zip(samples, self.steps, strict=True)):
            means = [float(t[row, :steps].mean()) if steps else 0.0 for t in (kl, agree, likelihood)]
            found.append(ForcedScore(sample, max(means[0], 0.0), means[1] if steps else 1.0, means[2], steps))
        return found

    def _scored(self, spec: ScorerSpec) -> list[Tensor]:
        """Prompt scores of a scorer, `[B, H, N]` per layer; the prompts run again for a new one."""
        name = spec.model_dump_json()
        if name not in self._scores:
            capture = _Capture({name: make_scorer(spec)})
            with switched(self.model, observers=(capture,)):
                self.model(**self.inputs, position_ids=self._prompt_positions(), use_cache=False)
            self._prompts = self._prompts or capture.layers
            self._scores[name] = capture.scores[name]
            self._positions = self._answer_positions()
        return self._scores[name]

    def _prompt_positions(self) -> Tensor | None:
        """Positions that skip padding, as `generate` makes them; multi-axis models make their own."""
        if _deltas(self.model) is not None or "mm_token_type_ids" in self.inputs:
            return None
        mask = self._mask[:, : self.modality.shape[1]]
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)

    def _answer_positions(self) -> Tensor:
        text = (self._mask.long().cumsum(dim=1) - 1)[:, self.modality.shape[1] :]
        deltas = _deltas(self.model)
        if deltas is None:
            return text
        return (text + deltas.to(text.device).view(-1, 1))[None].expand(3, -1, -1)


def _deltas(model: PreTrainedModel) -> Tensor | None:
    """Offset of answer positions that multi-axis RoPE models remember of the latest prompt."""
    found: Tensor | None = getattr(getattr(model, "model", None), "rope_deltas", None)
    return found


class ForcedSet:
    """Samples with the dense model's greedy answers, scored policy by policy."""

    def __init__(
        self, samples: list[str], answers: list[list[int]], batches: list[tuple[list[int], ForcedBatch]]
    ) -> None:
        self.samples, self.answers, self._batches = samples, answers, batches

    @classmethod
    @torch.inference_mode()
    def prepare(
        cls,
        loaded: LoadedModel,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> ForcedSet:
        """Answer every sample densely and greedily.

        Pictures are opened here; `UserError` names one that cannot be read.
        """
        model, adapter = loaded.model, loaded.adapter
        answers: list[list[int]] = [[] for _ in samples]
        batches = []
        ends = end_tokens(model)
        if progress:
            progress(0, len(samples))
        for start in range(0, len(samples), batch_size):
            rows = list(range(start, min(start + batch_size, len(samples))))
            inputs = adapter.encode(
                [samples[i].prompt for i in rows], [samples[i].open_images() for i in rows]
            )
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            for row, i in enumerate(rows):
                new = ids[row, inputs["input_ids"].shape[1] :].tolist()
                answers[i] = new[: answer_length(new, ends)]
            batches.append((rows, ForcedBatch(model, inputs, [answers[i] for i in rows])))
            if progress:
                progress(rows[-1] + 1, len(samples))
        return cls([sample.id for sample in samples], answers, batches)

    @property
    def shapes(self) -> list[PromptShape]:
        """Token counts of every sample's prompt, in the order of `samples`."""
        return [shape for _, batch in self._batches for shape in batch.shapes]

    @property
    def answer_tokens(self) -> float:
        """Mean number of decoding steps of the dense answers."""
        steps = [max(len(answer) - 1, 0) for answer in self.answers]
        return sum(steps) / max(len(steps), 1)

    def parts(self, policy: Policy) -> Iterator[list[ForcedScore]]:
        """Scores of a policy, batch by batch in the order of `samples`; stop asking to save the rest."""
        for rows, batch in self._batches:
            yield batch.score(policy, [self.samples[i] for i in rows])

    def score(self, policy: Policy) -> list[ForcedScore]:
        """Scores of a policy on every sample, in their order."""
        return [score for part in self.parts(policy) for score in part]
