"""What every study of a model and task needs, made once: dense answers, prefilled prompts, evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avlprof.allocators import Evidence
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.evaluation import Answer, AnswerSettings, AnswerStore, generate_answers
from avlprof.files import write_text
from avlprof.models import LoadedModel
from avlprof.policy import Policy, ScorerSpec, live_share
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Sample, Task, load_metric
from avlprof.tuning.candidate import Budget, scorer_spec
from avlprof.tuning.objective import OBJECTIVES, Scores
from avlprof.tuning.settings import Settings
from avlprof.watch import Watch

BATCH = 32


class Generated:
    """Greedy answers to a list of samples, judged by a task's metric.

    Answers in `store` are not generated again.

    Args:
        lengths: prompt tokens by sample id; samples of like length share a batch.
        limit: the longest answer, in tokens.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: Task,
        samples: Sequence[Sample],
        limit: int,
        lengths: Mapping[str, int],
        store: AnswerStore,
    ) -> None:
        self._loaded, self._task, self._asked = loaded, task, samples
        self._limit, self._lengths, self._store = limit, lengths, store

    @property
    def samples(self) -> list[str]:
        """Ids, in the order of the scores."""
        return [sample.id for sample in self._asked]

    def parts(self, policy: Policy | None) -> Iterator[list[Answer]]:
        """Answers batch by batch, in the order of the samples; None is the dense model."""
        for start in range(0, len(self._asked), BATCH):
            yield generate_answers(
                self._loaded,
                self._asked[start : start + BATCH],
                policy,
                AnswerSettings(self._limit, BATCH, self._task.metric, self._lengths),
                store=self._store,
            )

    def metric(self, policy: Policy | None) -> NDArray[np.float64]:
        """The task's metric `[n]`, one number a sample."""
        return np.array([answer.score for part in self.parts(policy) for answer in part])


LEVELS = (0.0, 0.05, 0.15, 0.4, 1.0)
SCORER = "instruction"


def probe(
    forced: ForcedSet, layers: int, scorer: str, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.float64]:
    """Damage `[layers, len(LEVELS)]`: KL to dense (nat per token) when one layer keeps a level.

    The levels of a layer share forward passes; at 1 nothing is dropped and the damage is 0.
    """
    damage = np.zeros((layers, len(LEVELS)))
    if progress:
        progress(0, layers * (len(LEVELS) - 1))
    below = [i for i, level in enumerate(LEVELS) if level < 1]
    for layer in range(layers):
        policies = [
            Policy(
                vision_keep=tuple(LEVELS[i] if other == layer else 1.0 for other in range(layers)),
                scorer=ScorerSpec(name=scorer),
            )
            for i in below
        ]
        for i, scores in zip(below, forced.score_many(policies), strict=True):
            damage[layer, i] = np.mean([score.kl for score in scores])
        if progress:
            progress((layer + 1) * len(below), layers * len(below))
    return damage


def probed(
    evidence: Evidence, forced: ForcedSet, path: Path, progress: Callable[[int, int], None] | None = None
) -> Evidence:
    """Evidence with damage curves, which are measured once and kept in a JSON file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        measured = probe(forced, evidence.layers, SCORER, progress)
        write_text(path, json.dumps({"levels": LEVELS, "damage": measured.tolist()}, indent=1) + "\n")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        damage, levels = np.array(held["damage"], dtype=float), np.array(held["levels"], dtype=float)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run again") from None
    if damage.shape != (evidence.layers, len(levels)):
        raise UserError(f"{path} is not of {evidence.layers} layers; delete it and run again")
    return replace(evidence, damage=damage, damage_levels=levels)


Progress = Callable[[str, int, int], None]


@dataclass
class Prepared:
    """A model and the samples to search on, with what the dense model said to them.

    Studies at several budgets share one, so that prompts are prefilled and answered once.
    """

    loaded: LoadedModel
    task: Task
    profile: Profile
    samples: Sequence[Sample]
    limit: int
    forced: ForcedSet
    kind: str
    evidence: Evidence
    _cheap: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        loaded: LoadedModel,
        task: Task,
        profile: Profile,
        settings: Settings,
        scorers: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Prepared:
        """Answer the samples of the search split densely, and prefill their prompts.

        Args:
            scorers: scorers that will be used; another one costs a further run of the prompts.

        Raises:
            UserError: no dense answer has a second token, or the profile is of another model.
        """
        check_same_model(loaded, profile)
        samples = task.samples(settings.split, settings.samples)
        limit = settings.answer_limit(task)
        forced = forced_answers(loaded, samples, limit, settings.objective, scorers, progress)
        if not forced.answer_tokens:
            kind = "reference" if settings.objective == "likelihood" else "dense"
            raise UserError(
                f"every {kind} answer ends at its first token, which no policy changes; "
                "choose a task with longer answers"
            )
        return cls(loaded, task, profile, samples, limit, forced, settings.objective, profile.evidence())

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.evidence.layers

    @cached_property
    def least(self) -> float:
        """The smallest budget that holds system and all text."""
        return live_share(Policy(vision_keep=0.0), self.forced.shapes, self.layers)

    def budget(self, settings: Settings) -> Budget:
        """The budget, counted on the prompts and answers that trials are scored on."""
        steps = max(round(self.forced.answer_tokens), 1)
        return Budget(settings.budget, settings.read_budget, tuple(self.forced.shapes), steps)

    def probe(self, path: Path, progress: Progress | None = None) -> None:
        """Add the damage of every layer to the evidence, from a file or measured once."""
        if self.evidence.damage is None:
            tell = progress or (lambda phase, done, total: None)
            self.evidence = probed(self.evidence, self.forced, path, lambda d, t: tell("probe", d, t))

    def generated(self, store: AnswerStore) -> Generated:
        """Policies scored by real answers to the samples."""
        lengths = {
            name: shape.total for name, shape in zip(self.forced.samples, self.forced.shapes, strict=True)
        }
        return Generated(self.loaded, self.task, self.samples, self.limit, lengths, store)

    def dense_metric(self, store: AnswerStore) -> NDArray[np.float64]:
        """The task's metric `[n]` of the dense model's answers, which are known unless references are."""
        if self.kind == "likelihood":
            return self.generated(store).metric(None)
        judge = load_metric(self.task.metric)
        texts = self.loaded.adapter.decode(self.forced.answers)
        return np.array(
            [judge(text, sample.answers) for text, sample in zip(texts, self.samples, strict=True)]
        )

    def scores(self, store: AnswerStore) -> Scores:
        """What trials are scored by."""
        return self.generated(store) if self.kind == "accuracy" else self.forced

    def cheap(self, policy: Policy) -> NDArray[np.float64]:
        """Forced score `[n]` of a policy, lower is better; KL to dense where trials generate."""
        if policy.hash not in self._cheap:
            value = OBJECTIVES["fidelity" if self.kind == "accuracy" else self.kind]
            self._cheap[policy.hash] = np.array([value(score) for score in self.forced.score(policy)])
        return self._cheap[policy.hash]


def check_same_model(loaded: LoadedModel, profile: Profile) -> None:
    """`UserError` unless the profile is of this model."""
    traced = profile.meta.settings.model_hash
    if traced and loaded.revision and traced != loaded.revision:
        raise UserError(
            f"the run was traced with another model ({profile.meta.settings.model} {traced}), "
            f"not with {loaded.source} {loaded.revision}; trace this model first"
        )


def forced_answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    limit: int,
    objective: str,
    scorers: Sequence[str],
    progress: Progress | None,
) -> ForcedSet:
    """The samples with the answers that an objective is scored on, at most `limit` tokens each.

    Args:
        scorers: names of scorers that will be used; another one costs a further run of the prompts.
    """
    return ForcedSet.prepare(
        loaded,
        samples,
        max_new_tokens=limit,
        batch_size=BATCH,
        answers="reference" if objective == "likelihood" else "dense",
        scorers=[scorer_spec(name) for name in scorers],
        watch=_Phases(progress),
    )


class _Phases(Watch):
    """Hands phases to a progress callback, if there is one."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def phase(self, name: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(name, done, total)
