"""A batch of prompts with known answers, scored under any number of policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from avlprof.attention.gate import governed_layers, head_size
from avlprof.attention.modality import modality_map, prompt_shapes, vision_token_ids
from avlprof.attention.session import switched, with_cache
from avlprof.policy import DENSE, Policy, PromptShape, ScorerSpec, scale_group
from avlprof.runtime.cuts import Cut, coded
from avlprof.runtime.forced.attention import ForcedRuntime, GroupAttention, windows
from avlprof.runtime.forced.cuts import CutAnswers, Known
from avlprof.runtime.forced.packing import (
    AnswerGroup,
    PackedRows,
    answer_groups,
    parts,
    policy_groups,
    runs,
)
from avlprof.runtime.forced.prefill import Prefixes
from avlprof.runtime.forced.prompt import Capture
from avlprof.runtime.forced.rows import Plans
from avlprof.runtime.forced.score import ForcedScore, Head, check_finite, closeness, scores_of
from avlprof.runtime.forced.stepped import SteppedBatch
from avlprof.runtime.support import check_runs

_ROWS = 1024  # answer rows of a forward pass: as many policies share one


class ForcedBatch:
    """Prompts with known answers, ready to be scored under any number of policies.

    Prompts run once, when first needed, and again for a scorer or a prefill filter that was not
    asked for before. Answers of similar length share a forward pass, and so do policies.

    Args:
        model: the dense model.
        inputs: a left-padded batch as `generate` takes it, `input_ids [B, N]` and companions.
        answers: token ids of each row's answer, its end token included.
        scorers: scorers of policies to come; each one that is not named costs another run.
        head: the model's head, which batches can share.
        captured: what a dense run of these inputs left, to spare another one.
        reference: other prompts with the same answers, by which the dense model's is meant: those of the
            pictures as they are, where these are of smaller ones.
        within: the context in which the model takes these inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        answers: Sequence[Sequence[int]],
        *,
        scorers: Sequence[ScorerSpec] = (),
        head: Head | None = None,
        captured: Capture | None = None,
        reference: ForcedBatch | None = None,
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self._reference, self._within = model, reference, within
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        self.modality = modality_map(ids, mask, vision_token_ids(model.config))
        text = model.config.get_text_config(decoder=True)
        self.shapes: list[PromptShape] = prompt_shapes(
            self.modality, governed_layers(text), scale_group(head_size(text))
        )
        self.answers = [list(answer) for answer in answers]
        self.lengths = [len(answer) for answer in answers]
        self.steps = [max(length - 1, 0) for length in self.lengths]
        order = sorted(range(len(answers)), key=lambda row: self.steps[row])
        self._order = torch.tensor(order, device=ids.device)
        self._head = head or Head(model)
        self._windows = windows(text)
        self._prefixes = Prefixes(model, inputs, mask, self.shapes, self._order, self._head, scorers, within)
        if captured is not None:
            self._prefixes.keep(captured, DENSE)
        grouped = answer_groups([self.steps[row] for row in order], _ROWS)
        groups = [AnswerGroup.of(rows, [answers[order[i]] for i in rows], ids.device) for rows in grouped]
        self._passes = list(runs(groups, [group.tokens.numel() for group in groups], _ROWS))
        self._targets = torch.tensor([[*answers[row], 0][0] for row in order], device=ids.device)
        self._dense: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        self._cut: dict[str, CutAnswers | None] = {}
        self._stepped: SteppedBatch | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held of prefilled prompts."""
        return self._prefixes.nbytes

    @property
    def parked(self) -> int:
        """Bytes held of them on the host."""
        return self._prefixes.parked

    def forget(self) -> None:
        """Let go of copies of the prompts in few bits."""
        self._prefixes.forget()

    def drop(self) -> None:
        """Let the prefilled prompts go; they run again when next needed."""
        self._prefixes.drop()

    def park(self) -> None:
        """Move the prefilled prompts to the host until they are next needed."""
        self._prefixes.park()

    @torch.inference_mode()
    def logits(self, policy: Policy) -> Tensor:
        """Logits `[B, T, V]` of the steps behind each answer token; zeros behind an answer's end."""
        check_runs(policy)
        logits = torch.zeros(len(self.steps), max([*self.steps, 1]), self._head.vocabulary)
        logits = logits.to(self._order.device)
        with switched(self.model):
            self._prefixes.prepare([policy])
            for groups in self._passes:
                rows = self._head.logits(self._hidden([policy], groups)[0])
                steps = torch.cat([group.real.nonzero()[:, 1] for group in groups])
                logits[self._owners(groups), steps] = rows
        return logits

    def score(self, policy: Policy, samples: Sequence[str]) -> list[ForcedScore]:
        """Compare a policy with dense on every row; `samples` are the rows' ids."""
        return self.score_many([policy], samples)[0]

    @torch.inference_mode()
    def score_many(self, policies: Sequence[Policy], samples: Sequence[str]) -> list[list[ForcedScore]]:
        """Compare policies with dense on every row, `[policy][row]`; they share passes where they can."""
        for policy in policies:
            check_runs(policy)
        sums = torch.zeros((3, len(policies), len(self.steps)), device=self._order.device)
        with switched(self.model):
            for kind in policy_groups(policies):
                alike = [policies[i] for i in kind]
                self._prefixes.prepare(alike)
                sums[:, kind] = self._first(alike[0])
                for number, groups in enumerate(self._passes):
                    targets = torch.cat([group.targets[group.real] for group in groups])
                    for part in parts(kind, _ROWS // sum(_sizes(groups))):
                        ours = self._hidden([policies[i] for i in part], groups)
                        close = closeness(self._head, self._dense_hidden(number), ours, targets)
                        sums[:, part] = sums[:, part].index_add(2, self._owners(groups), close)
        with self._within():
            check_finite(self.model, self._prefixes.inputs, sums[0], policies, samples)
        return scores_of(sums, samples, self.lengths)

    @torch.inference_mode()
    def score_cuts(self, cuts: Sequence[Cut], samples: Sequence[str]) -> list[list[ForcedScore]]:
        """Compare the model without routes with dense on every row, `[cut][row]`.

        Cuts of routes that begin at one source share passes over the rows from there on. Where a picture
        comes behind these rows, or earlier rows see them, the answers are said token by token.
        """
        scores: dict[int, list[ForcedScore]] = {}
        for source in dict.fromkeys(cut.route.source for cut in cuts):
            mine = [i for i, cut in enumerate(cuts) if cut.route.source == source]
            own = [cuts[i] for i in mine]
            answers = self._cut_answers(source)
            if answers is None:
                found = self._by_steps.score_many(own, samples)
            else:
                with switched(self.model):
                    sums = torch.empty((3, len(own), len(self.steps)), device=self._order.device)
                    sums[..., self._order] = answers.sums(own)
                check_finite(self.model, self._prefixes.inputs, sums[0], own, samples)
                found = scores_of(sums, samples, self.lengths)
            scores |= dict(zip(mine, found, strict=True))
        return [scores[i] for i in range(len(cuts))]

    def _cut_answers(self, source: str) -> CutAnswers | None:
        if source not in self._cut:
            codes = coded(self.modality, self.modality.shape[1])[self._order]
            ids = self._prefixes.inputs["input_ids"][self._order]
            answers = [self.answers[row] for row in self._order.tolist()]
            known = Known(self.model, self._prefixes, self._head, ids, codes, answers, self._windows)
            self._cut[source] = CutAnswers(known, source) if known.serves(source) else None
        return self._cut[source]

    @property
    def _by_steps(self) -> SteppedBatch:
        if self._stepped is None:
            self._stepped = SteppedBatch(self.model, self._prefixes.inputs, self.answers, head=self._head)
        return self._stepped

    @torch.inference_mode()
    def refreshes(self, policy: Policy) -> list[int]:
        """How many of the answers' steps refresh in each layer, where what refreshes is triggered."""
        check_runs(policy)
        counts = [0] * len(self._windows)
        with switched(self.model):
            self._prefixes.prepare([policy])
            for groups in self._passes:
                attention = [self._attention([policy], group) for group in groups]
                self._hidden([policy], groups, attention)
                for group, own in zip(groups, attention, strict=True):
                    for layer, due in own.due.items():
                        counts[layer] += int((due[:, 0] & group.real).sum())
        return counts

    def _hidden(
        self,
        policies: Sequence[Policy],
        groups: Sequence[AnswerGroup],
        attention: Sequence[GroupAttention] | None = None,
    ) -> Tensor:
        """Last hidden states `[P, R, D]` of the answers of groups under policies that share a pass."""
        packed = PackedRows.of(groups, len(policies))
        own = attention or [self._attention(policies, group) for group in groups]
        runtime = ForcedRuntime(packed, own)
        cache = runtime.new_cache()
        positions = [self._prefixes.positions(group.rows, group.real.shape[1]) for group in groups]
        with switched(self.model, runtime=runtime) as session, self._head.watched(short=True) as seen:
            session.adopt(cache, self.modality[:1])
            self.model(
                input_ids=packed.packed([group.tokens for group in groups])[None],
                position_ids=packed.packed(positions).unsqueeze(-2),
                **with_cache(self.model, cache),
            )
        assert seen.rows is not None
        return seen.rows[0][packed.order]

    def _attention(self, policies: Sequence[Policy], group: AnswerGroup) -> GroupAttention:
        prompts = self._prefixes.rows(policies[0], group.rows)
        shapes = [self.shapes[row] for row in self._order[group.rows].tolist()]
        plans = Plans(policies, shapes, len(prompts.layers), group.real.shape[1], self._order.device)
        return GroupAttention(policies, prompts, plans, self.modality.shape[1], self._windows)

    def _owners(self, groups: Sequence[AnswerGroup]) -> Tensor:
        """Row `[R]` of the batch, in the caller's order, of every answer token of groups."""
        return torch.cat([self._order[g.rows, None].expand_as(g.real)[g.real] for g in groups])

    def _dense_hidden(self, number: int) -> Tensor:
        """The dense model's last hidden states `[R, D]` of a pass."""
        if self._reference is not None:  # whose answers are these, and so its passes
            return self._reference._dense_hidden(number)
        if number not in self._dense:
            self._prefixes.prepare([DENSE])
            self._dense[number] = self._hidden([DENSE], self._passes[number])[0]
        return self._dense[number]

    def _dense_last(self) -> Tensor:
        """The dense model's last hidden states `[B, D]` of the prompts, in the order."""
        if self._reference is not None:
            return self._reference._dense_last()
        if self._last is None:
            self._prefixes.prepare([DENSE])
            self._last = self._prefixes.last(DENSE)
        return self._last

    def _first(self, policy: Policy) -> Tensor:
        """Closeness `[3, 1, B]` of the first answer tokens, in the caller's order."""
        dense, ours = self._dense_last(), self._prefixes.last(policy)[None]
        close = torch.empty(3, 1, len(self.steps), device=ours.device)
        close[..., self._order] = closeness(self._head, dense, ours, self._targets)
        return close * (torch.tensor(self.lengths, device=ours.device) > 0)


def _sizes(groups: Sequence[AnswerGroup]) -> list[int]:
    return [int(group.real.sum()) for group in groups]
