"""What every study of a model and task needs, made once: dense answers, prefilled prompts, evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avlprof.allocators import Evidence
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.evaluation import Answer, AnswerSettings, AnswerStore, answers_under
from avlprof.evaluation.doubts import check_finite
from avlprof.models import LoadedModel
from avlprof.models.identity import listed, settings_differences
from avlprof.models.smaller import SamplePictures
from avlprof.policy import Policy, live_share
from avlprof.policy.parts import PictureKind
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Sample, Task, load_metric
from avlprof.tuning.candidate import Budget, Candidate, noted_starts, scorer_spec
from avlprof.tuning.objective import OBJECTIVES, Objective, Scores, rungs
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.watch import SILENT, Watch


class Generated:
    """Greedy answers to a list of samples, judged by a task's metric.

    `settings` say how; answers in `store` are not generated again.
    """

    def __init__(
        self, loaded: LoadedModel, samples: Sequence[Sample], settings: AnswerSettings, store: AnswerStore
    ) -> None:
        self._loaded, self._samples, self._settings, self._store = loaded, samples, settings, store

    @property
    def samples(self) -> list[str]:
        """Ids, in the order of the scores."""
        return [sample.id for sample in self._samples]

    def batches(self) -> Iterator[Callable[[Sequence[Policy | None]], list[list[Answer]]]]:
        """For each batch, in the order of the samples, what answers it: `[policy][sample]`; None is dense."""
        size = self._settings.batch_size
        for start in range(0, len(self._samples), size):
            part = self._samples[start : start + size]
            yield partial(self._answers_of, part)

    def _answers_of(self, samples: Sequence[Sample], policies: Sequence[Policy | None]) -> list[list[Answer]]:
        return answers_under(self._loaded, samples, policies, self._settings, store=self._store)

    def refreshed(self, policy: Policy) -> tuple[float, ...] | None:
        """It is not known how often an answer refreshes before it is generated."""
        return None

    def metric(self, policy: Policy | None) -> NDArray[np.float64]:
        """The task's metric `[n]`, one number a sample."""
        return self.metrics([policy])[0]

    def metrics(self, policies: Sequence[Policy | None], watch: Watch = SILENT) -> list[NDArray[np.float64]]:
        """The task's metric `[n]` of each policy; the phase `answers` of `watch` counts answers."""
        found = answers_under(
            self._loaded, self._samples, policies, self._settings, store=self._store, watch=watch
        )
        return [np.array([answer.score for answer in answers]) for answers in found]


@dataclass(frozen=True)
class Prepared:
    """A model and the samples to search on, with what the dense model said to them, and evidence.

    Studies at several budgets share one, so that prompts are prefilled and answered once. Whoever
    begins a study makes one with the evidence of a traced run, whoever joins it with the study's own.

    Attributes:
        limit: the longest answer, in tokens.
        kind: a name of `OBJECTIVES`.
        run, run_hash: the traced run that the evidence is from; a worker that joins knows the hash.
        batch_size: samples that run together.
        pictured: the ways in which policies may make pictures smaller.
    """

    loaded: LoadedModel
    task: Task
    samples: Sequence[Sample]
    limit: int
    kind: str
    forced: ForcedSet
    evidence: Evidence
    run: str = ""
    run_hash: str = ""
    batch_size: int = 32
    pictured: tuple[PictureKind, ...] = ()
    _cheap: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        loaded: LoadedModel,
        task: Task,
        evidence: Evidence,
        settings: Settings,
        watch: Watch = SILENT,
    ) -> Prepared:
        """Answer the samples of the search split densely, and prefill their prompts.

        Raises:
            UserError: no answer has a second token.
        """
        samples = task.samples(settings.split, settings.samples)
        limit, kind = settings.answer_limit(task), settings.objective
        # a larger one would score trials on samples that they stop before
        size = min([settings.batch_size, *(rungs(len(samples)) if settings.halves else ())])
        forced = ForcedSet.prepare(
            loaded,
            samples,
            max_new_tokens=limit,
            batch_size=size,
            memory=settings.prompt_bytes,
            answers="reference" if kind == "likelihood" else "dense",
            # another scorer would cost a further run of the prompts
            scorers=[scorer_spec(name) for name in settings.space.scorers],
            watch=watch,
        )
        if not forced.answer_tokens:
            source = "reference" if kind == "likelihood" else "dense"
            raise UserError(
                f"every {source} answer ends at its first token, which no policy changes; "
                "choose a task with longer answers"
            )
        # what the model says, whatever a run of 0.1.0 noted
        evidence = replace(evidence, governed=loaded.adapter.governed)
        ways = settings.space.picture_kinds
        return cls(loaded, task, samples, limit, kind, forced, evidence, batch_size=size, pictured=ways)

    def with_evidence(self, evidence: Evidence) -> Prepared:
        """The same with other evidence."""
        return replace(self, evidence=evidence)

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.evidence.layers

    @cached_property
    def pictures(self) -> SamplePictures:
        """Those of the samples, in their order."""
        return SamplePictures(self.loaded.adapter, self.samples)

    @cached_property
    def least(self) -> float:
        """The smallest budget that holds system and all text."""
        return live_share(Policy(vision_keep=0.0), self.forced.shapes, self.layers)

    def budget(self, memory: float, read: float | None) -> Budget:
        """The budget, counted on the prompts and answers that trials are scored on."""
        steps = max(round(self.forced.answer_tokens), 1)
        shapes = self.pictures.on(self.forced.shapes, *self.pictured) if self.pictured else self.forced.shapes
        return Budget(memory, read, tuple(shapes), steps)

    def objective(
        self, folder: Path, space: Space, budget: Budget, starts: Sequence[Candidate] = ()
    ) -> Objective:
        """What trials of the study in a folder are scored by, and what they choose from.

        A new study notes the `starts` that it takes over.

        Raises:
            UserError: the budget is infeasible, or no allocator has the evidence that it needs.
        """
        space = space.within(budget, self.layers).supported(self.evidence)
        space = replace(space, more_starts=noted_starts(folder, starts))
        scores: Scores = self.forced
        if self.kind == "accuracy":
            scores = self.generated(answer_store(folder))
        return Objective(scores, self.evidence, budget, space, self.kind)

    def generated(self, store: AnswerStore) -> Generated:
        """Policies scored by real answers to the samples."""
        names, forced = self.forced.samples, self.forced
        prompts = {name: shape.total for name, shape in zip(names, forced.shapes, strict=True)}
        answers = {name: len(answer) for name, answer in zip(names, forced.answers, strict=True)}
        settings = AnswerSettings(self.limit, self.batch_size, self.task.metric, prompts, answers)
        return Generated(self.loaded, self.samples, settings, store)

    def dense_metric(self, store: AnswerStore) -> NDArray[np.float64]:
        """The task's metric `[n]` of the dense model's answers, which are known unless references are."""
        if self.kind == "likelihood":
            return self.generated(store).metric(None)
        judge = load_metric(self.task.metric)
        texts = self.loaded.adapter.decode(self.forced.answers)
        scores = np.array(
            [judge(text, sample.answers) for text, sample in zip(texts, self.samples, strict=True)], float
        )
        check_finite(scores, self.task.metric, [sample.id for sample in self.samples])
        return scores

    def cheap(self, policy: Policy) -> NDArray[np.float64]:
        """Forced score `[n]` of a policy, lower is better; KL to dense where trials generate."""
        return self.cheap_scores([policy])[0]

    def cheap_scores(self, policies: Sequence[Policy], watch: Watch = SILENT) -> list[NDArray[np.float64]]:
        """Forced scores `[policy][n]`, as `cheap`; policies share passes, `watch` is told by `score_many`."""
        value = OBJECTIVES["fidelity" if self.kind == "accuracy" else self.kind]
        new = {policy.hash: policy for policy in policies if policy.hash not in self._cheap}
        found = self.forced.score_many([*new.values()], watch) if new else []
        for name, scores in zip(new, found, strict=True):
            self._cheap[name] = np.array([value(score) for score in scores])
        return [self._cheap[policy.hash] for policy in policies]


def prepare(
    loaded: LoadedModel, task: Task, profile: Profile, settings: Settings, watch: Watch = SILENT
) -> Prepared:
    """What studies need, with the evidence of a traced run's profile.

    Raises:
        UserError: as `Prepared.make`, the profile is of another model, or heads are to be moved and each
            layer has one.
    """
    check_same_model(loaded, profile)
    if settings.refine_heads and loaded.adapter.kv_heads < 2:
        raise UserError(
            f"refine_heads moves the KV heads of a layer against each other, and each layer of {loaded.name} "
            "has one; leave it out"
        )
    prepared = Prepared.make(loaded, task, profile.evidence(), settings, watch)
    return replace(prepared, run=profile.meta.run, run_hash=profile.meta.run_hash)


def answer_store(folder: Path) -> AnswerStore:
    """Where a study keeps generated answers."""
    return AnswerStore(folder / "answers")


def check_same_model(loaded: LoadedModel, profile: Profile) -> None:
    """`UserError` unless the profile is of this model."""
    traced = profile.meta.settings.model_hash
    if traced and loaded.revision and traced != loaded.revision:
        raise UserError(
            f"the run was traced with another model ({profile.meta.settings.model} {traced}), "
            f"not with {loaded.source} {loaded.revision}; trace this model first"
        )
    noted = profile.meta.settings.checkpoint
    if noted and (different := settings_differences(noted, loaded.settings)):
        raise UserError(
            f"the run was traced with other settings of the model ({listed(different)}); "
            "trace this model first"
        )
