"""Score policies without generating: one forward over a known answer per policy.

The dense model answers every sample once and its prompts are prefilled once; each policy then
costs one forward over the answers' tokens. The scores compare a policy with the dense model on
the dense model's own answer, so no labels are needed and differences between policies are paired;
or on a reference, whose likelihood then says how well a policy answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from avlprof.attention.session import switched
from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.models.answers import answer_length, end_tokens, reference_tokens
from avlprof.models.context import check_context
from avlprof.models.generation import greedy
from avlprof.models.smaller import smaller_pictures
from avlprof.policy import PicturePolicy, Policy, PromptShape, ScorerSpec
from avlprof.runtime.cuts import Cut
from avlprof.runtime.forced.attention import not_forced
from avlprof.runtime.forced.batch import ForcedBatch
from avlprof.runtime.forced.prompt import Capture
from avlprof.runtime.forced.room import Room, prompt_bytes, say_room
from avlprof.runtime.forced.score import ForcedScore, Head
from avlprof.runtime.forced.stepped import SteppedBatch
from avlprof.tasks import Sample
from avlprof.watch import SILENT, Watch

Answers = Literal["dense", "reference"]
Batch = ForcedBatch | SteppedBatch
MOST_WAYS = 8
"""Ways of making pictures smaller whose prompts are held: as many as a search chooses between."""


@dataclass(frozen=True)
class _Source:
    """What batches are made of."""

    loaded: LoadedModel
    samples: Sequence[Sample]
    scorers: Sequence[ScorerSpec]
    head: Head

    def smaller(
        self, pictures: PicturePolicy, rows: Sequence[int], answers: Sequence[list[int]], whole: Batch
    ) -> Batch:
        """The prompts `rows` with smaller pictures, judged by the answers of the dense model to `whole`."""
        with smaller_pictures(self.loaded, pictures) as smaller:
            inputs = smaller.adapter.encode_samples([self.samples[i] for i in rows])
        within, model = partial(smaller_pictures, self.loaded, pictures), self.loaded.model
        if isinstance(whole, SteppedBatch):
            return SteppedBatch(model, inputs, answers, head=self.head, reference=whole, within=within)
        return ForcedBatch(
            model, inputs, answers, scorers=self.scorers, head=self.head, reference=whole, within=within
        )


class ForcedSet:
    """Samples with known answers, scored policy by policy or for many policies at once.

    The prefilled prompts of all samples stay on the device as far as there is room. Batches beyond that
    wait on the host, where that is another memory and has room, or run their prompts anew each time
    they are scored, which many policies in one call share. Scores do not depend on it.

    Policies with smaller `pictures` are scored on prompts of their own, made when first asked for, on the
    answers of the dense model to the pictures as they are; those of the newest `MOST_WAYS` ways are held.
    """

    def __init__(
        self,
        samples: list[str],
        answers: list[list[int]],
        batches: list[tuple[list[int], Batch]],
        room: Room | None = None,
        source: _Source | None = None,
    ) -> None:
        self.samples, self.answers, self._batches, self.room = samples, answers, batches, room or Room()
        self._source, self._smaller = source, dict[tuple[PicturePolicy, int], Batch]()

    @classmethod
    @torch.inference_mode()
    def prepare(
        cls,
        loaded: LoadedModel,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        answers: Answers = "dense",
        scorers: Sequence[ScorerSpec] = (),
        memory: int | None = None,
        watch: Watch = SILENT,
    ) -> ForcedSet:
        """Answer every sample densely and greedily, or take its first reference as the answer.

        Prompts are prefilled here, by the run that answers them.

        Args:
            scorers: scorers of policies that will be scored; each one that is not named here costs
                another run of the prompts.
            memory: bytes of prefilled prompts that may stay on the device; None is half of what is
                free, and then batches are made smaller where one alone would take more.
            watch: its phase `dense answers` counts samples; it is told the bytes beforehand.

        Raises:
            UserError: a picture cannot be read, or a sample has no reference.
        """
        room, each = Room.of(loaded, memory), prompt_bytes(loaded, samples)
        wanted = batch_size
        batch_size = room.batch(wanted, each) if memory is None else wanted
        why = not_forced(loaded.adapter.text_config)
        if why is None:
            say_room(watch, room, each, len(samples), batch_size, wanted)
        else:
            watch.say(f"answers are scored token by token, which takes a generation a policy: {why}")
        head = Head(loaded.model)
        source = _Source(loaded, samples, scorers, head)
        forced = cls([sample.id for sample in samples], [], [], room, source)
        watch.phase("dense answers", 0, len(samples))
        for start in range(0, len(samples), batch_size):
            rows = list(range(start, min(start + batch_size, len(samples))))
            part = [samples[i] for i in rows]
            inputs = loaded.adapter.encode_samples(part)
            capture = None
            if answers == "reference":
                lasts = inputs["input_ids"][:, -1].tolist()
                whole = [reference_tokens(loaded, s, last) for s, last in zip(part, lasts, strict=True)]
                tokens = [answer[:max_new_tokens] for answer in whole]
                check_context(loaded.model, inputs, [s.id for s in part], max(map(len, tokens)))
            else:
                capture = Capture(list(scorers)) if why is None else None
                tokens = _dense_answers(loaded.model, inputs, part, max_new_tokens, capture, head)
            forced.answers += tokens
            batch: Batch
            if why is None:
                batch = ForcedBatch(
                    loaded.model, inputs, tokens, scorers=scorers, head=head, captured=capture
                )
            else:
                batch = SteppedBatch(loaded.model, inputs, tokens, head=head)
            forced._batches.append((rows, batch))
            forced._make_room(batch)
            watch.phase("dense answers", rows[-1] + 1, len(samples))
        return forced

    @property
    def shapes(self) -> list[PromptShape]:
        """Token counts of every sample's prompt, in the order of `samples`."""
        return [shape for _, batch in self._batches for shape in batch.shapes]

    @property
    def answer_tokens(self) -> float:
        """Mean number of decoding steps of the answers: their tokens behind the first."""
        steps = [max(len(answer) - 1, 0) for answer in self.answers]
        return sum(steps) / max(len(steps), 1)

    @property
    def nbytes(self) -> int:
        """Bytes held of prefilled prompts."""
        return sum(batch.nbytes for batch in self._held())

    def batches(self) -> Iterator[Callable[[Sequence[Policy]], list[list[ForcedScore]]]]:
        """For each batch, in the order of `samples`, what scores policies on it: `[policy][sample]`.

        Policies share passes. Leave some out, or stop asking, to save the rest.
        """
        for number in range(len(self._batches)):
            yield partial(self._score, number)

    def _score(self, number: int, policies: Sequence[Policy]) -> list[list[ForcedScore]]:
        """Scores of one batch; policies whose pictures are alike share prompts."""
        names = [self.samples[i] for i in self._batches[number][0]]
        scores: dict[int, list[ForcedScore]] = {}
        for pictures in dict.fromkeys(map(_pictures, policies)):
            alike = [i for i, policy in enumerate(policies) if _pictures(policy) == pictures]
            batch = self._batch(number, pictures)
            found = batch.score_many([policies[i].of_cache for i in alike], samples=names)
            scores |= dict(zip(alike, found, strict=True))
            self._make_room(batch)
            self._make_room(self._batches[number][1])  # whose dense answers were the measure
        return [scores[i] for i in range(len(policies))]

    def _batch(self, number: int, pictures: PicturePolicy | None) -> Batch:
        rows, whole = self._batches[number]
        if pictures is None:
            return whole
        if (pictures, number) not in self._smaller:
            if self._source is None:
                raise UserError("pictures of prompts that were encoded elsewhere cannot be made smaller")
            ways = list(dict.fromkeys(way for way, _ in self._smaller))
            if pictures not in ways and len(ways) >= MOST_WAYS:
                self._smaller = {key: batch for key, batch in self._smaller.items() if key[0] != ways[0]}
            answers = [self.answers[i] for i in rows]
            self._smaller[pictures, number] = self._source.smaller(pictures, rows, answers, whole)
        return self._smaller[pictures, number]

    def _held(self) -> list[Batch]:
        """All batches, those with smaller pictures behind the others."""
        return [*(batch for _, batch in self._batches), *self._smaller.values()]

    def score(self, policy: Policy) -> list[ForcedScore]:
        """Scores of a policy on every sample, in their order."""
        return self.score_many([policy])[0]

    def score_many(self, policies: Sequence[Policy], watch: Watch = SILENT) -> list[list[ForcedScore]]:
        """Scores `[policy][sample]` of several policies, which share passes where they can.

        Args:
            watch: its phase `scores` counts scores, of one policy on one sample each.
        """
        scores: list[list[ForcedScore]] = [[] for _ in policies]
        for score in self.batches():
            for own, more in zip(scores, score(policies), strict=True):
                own.extend(more)
            watch.phase("scores", sum(map(len, scores)), len(policies) * len(self.samples))
        return scores

    def refreshed(self, policy: Policy) -> tuple[float, ...] | None:
        """The share of the answers' steps that refresh in each layer, where refreshes are triggered.

        None where answers are said token by token.
        """
        counts: list[int] = []
        for number in range(len(self._batches)):
            batch = self._batch(number, _pictures(policy))
            if isinstance(batch, SteppedBatch):
                return None
            own = batch.refreshes(policy.of_cache)
            counts = [a + b for a, b in zip(counts or [0] * len(own), own, strict=True)]
            self._make_room(batch)
        steps = max(round(self.answer_tokens * len(self.answers)), 1)
        return tuple(count / steps for count in counts)

    def score_cuts(self, cuts: Sequence[Cut]) -> list[list[ForcedScore]]:
        """Scores `[cut][sample]` of the model without routes; cuts share passes where they can."""
        scores: list[list[ForcedScore]] = [[] for _ in cuts]
        for rows, batch in self._batches:
            found = batch.score_cuts(cuts, [self.samples[i] for i in rows])
            for own, more in zip(scores, found, strict=True):
                own.extend(more)
            self._make_room(batch)
        return scores

    @property
    def parked(self) -> int:
        """Bytes of them that wait on the host."""
        return sum(batch.parked for batch in self._held())

    def _make_room(self, batch: Batch) -> None:
        """Park or drop the prompts of a batch where all that is held is too much: the first ones stay."""
        if self.room.device is None or self.nbytes <= self.room.device:
            return
        for one in self._held():
            one.forget()
        if self.nbytes <= self.room.device:
            return
        if self.room.host != 0 and self.room.fits_host(self.parked - batch.parked + batch.nbytes):
            batch.park()
        else:
            batch.drop()


def _pictures(policy: Policy) -> PicturePolicy | None:
    """What makes its prompts other than those of the pictures as they are."""
    return policy.pictures if policy.shrinks else None


def _dense_answers(
    model: Any,
    inputs: dict[str, Tensor],
    samples: Sequence[Sample],
    max_new_tokens: int,
    capture: Capture | None,
    head: Head,
) -> list[list[int]]:
    ends = end_tokens(model)
    with ExitStack() as stack:
        if capture is not None:
            stack.enter_context(switched(model, observers=(capture,)))
            stack.enter_context(capture.reading_last(head))
        ids = greedy(model, inputs, [sample.id for sample in samples], max_new_tokens=max_new_tokens)
    new = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: answer_length(row, ends)] for row in new]


def fidelity(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    policies: Sequence[Policy],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    watch: Watch = SILENT,
) -> list[list[ForcedScore]]:
    """Teacher-forced scores, `[policy][sample]`, in the order of the arguments.

    One batch of prompts is held at a time, so memory does not grow with the number of samples.

    Args:
        watch: its phase `fidelity` counts scores, of one policy on one sample each.
    """
    scores: list[list[ForcedScore]] = [[] for _ in policies]
    total = len(policies) * len(samples)
    for start in range(0, len(samples) if policies else 0, batch_size):
        chunk = samples[start : start + batch_size]
        forced = ForcedSet.prepare(
            loaded,
            chunk,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            scorers=[policy.scorer for policy in policies],
        )
        done = start * len(policies)
        for number, (own, more) in enumerate(zip(scores, forced.score_many(policies), strict=True), 1):
            own.extend(more)
            watch.phase("fidelity", done + number * len(chunk), total)
    return scores
