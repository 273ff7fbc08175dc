"""A store of answers that other processes help to fill, and what such a process does."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from avlprof.errors import UserError
from avlprof.evaluation.answers import AnswerSettings, answers_under, lacking_alike
from avlprof.evaluation.batches import answer_batches
from avlprof.evaluation.store import AnswerStore, Ask, model_key, policy_key
from avlprof.launchers import Launch
from avlprof.launchers.queue import Looking, Queue, Taken, Team
from avlprof.models import LoadedModel, ModelSpec
from avlprof.policy import Policy
from avlprof.tasks import Sample, Task
from avlprof.tasks.spec import TaskSpec
from avlprof.watch import SILENT, Watch

SHARES: Final = 8
"""Tasks for each worker, as far as there are batches: so all end at about the same time."""
MOST_BATCHES: Final = 8


class SharedStore(AnswerStore):
    """Answers on disk, which others help to make; as a context it starts them, and stops them.

    Batches are those that one process alone would make, so the answers are the same.

    Args:
        path: the folder of answers; the queue is in it.
        launch: how many work, this process included, and what starts the others.
        model, task: what the others load.

    Raises:
        UserError: what the launcher says, or a worker that cannot work.
    """

    def __init__(self, path: Path, launch: Launch, model: ModelSpec, task: TaskSpec) -> None:
        super().__init__(path)
        loading = [*model.words(), *task.words()]
        self.team = Team(launch, path, lambda queue: ["-m", "avlprof", "join", str(queue), *loading])

    def __enter__(self) -> SharedStore:
        self.team.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.team.__exit__(*error)

    def share(self, loaded: LoadedModel, asks: Callable[[], Iterable[Ask]], watch: Watch = SILENT) -> None:
        key = model_key(loaded)
        known = {f"{number:06d}": task for number, task in enumerate(self._tasks(loaded, asks(), key))}
        total = sum(task.answers for task in known.values())

        def serve(name: str, look: Callable[[], None]) -> None:
            task, looking = known[name], Looking(look)
            answers_under(loaded, task.samples, task.policies, task.settings, store=self, watch=looking)

        def tell(left: set[str]) -> None:
            watch.phase("answers", total - sum(known[name].answers for name in left), total)

        if known:
            about = {"model": key, "parts": str(self.path.resolve())}
            self.team.work({name: about | _dumped(task) for name, task in known.items()}, serve, tell)
            self.read_new()

    def _tasks(self, loaded: LoadedModel, asks: Iterable[Ask], key: str) -> list[Ask]:
        """What is not known yet, in batches as one process alone would make them, some to a task.

        Policies of a batch share its prompt, so they go to one task where there are batches enough.
        """
        queued, batches = dict[tuple[str, int], set[str]](), list[Ask]()
        for ask in asks:
            limit, lacking = ask.settings.max_new_tokens, list[set[str]]()
            policies = {policy_key(policy): policy for policy in ask.policies}
            for name, policy in policies.items():
                here = queued.setdefault((name, limit), set())
                lacking.append(here | set(self.answers(key, policy, ask.samples, limit)))
                here.update(sample.id for sample in ask.samples)
            for some, todo in lacking_alike(policies.values(), lacking, ask.samples):
                own = replace(ask, policies=tuple(some))
                batches += [
                    replace(own, samples=tuple(batch)) for batch in answer_batches(loaded, todo, ask.settings)
                ]
        wanted = SHARES * self.team.count
        return _joined(batches, len(batches) // wanted) if len(batches) >= wanted else _split(batches, wanted)


def open_store(path: Path, launch: Launch, model: ModelSpec, task: TaskSpec) -> AnswerStore:
    """The answers of a folder; shared with others where a launch has any."""
    return AnswerStore(path) if launch.alone else SharedStore(path, launch, model, task)


def serve_answers(loaded: LoadedModel, task: Task, queue: Queue, worker: str) -> int:
    """Answer what a queue asks for until who leads is gone; how many tasks.

    Raises:
        UserError: the model or a sample is another one here than where the tasks come from.
    """
    done = 0
    for taken in queue.tasks(worker):
        _serve(loaded, task, taken)
        done += 1
    return done


def _serve(loaded: LoadedModel, task: Task, taken: Taken) -> None:
    asked, own = taken.read(), model_key(loaded)
    if asked is None:
        return
    if own != asked["model"]:
        raise UserError(f"the model on {platform.node()} is {own}, the work is for {asked['model']}")
    samples = _samples(task, asked)
    policies = [policy and Policy.model_validate(policy) for policy in asked["policies"]]
    settings = AnswerSettings(
        asked["max_new_tokens"], asked["batch_size"], asked["metric"], asked["lengths"] or None
    )
    # a store that knows nothing: a part of the task that somebody had done would change its batches
    store = AnswerStore(Path(asked["parts"]), read=False)
    answers_under(loaded, samples, policies, settings, store=store)
    taken.done()


def _dumped(ask: Ask) -> dict[str, Any]:
    settings, lengths = ask.settings, ask.settings.lengths or {}
    return {
        "policies": [policy and policy.model_dump(mode="json", by_alias=True) for policy in ask.policies],
        "split": ask.split,
        "count": ask.count,
        "samples": [sample.id for sample in ask.samples],
        "asked": _asked(ask.samples),
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "metric": settings.metric,
        "lengths": {sample.id: lengths[sample.id] for sample in ask.samples if sample.id in lengths},
    }


def _samples(task: Task, asked: dict[str, Any]) -> list[Sample]:
    there = {sample.id: sample for sample in task.samples(asked["split"], asked["count"])}
    samples = [there[name] for name in asked["samples"] if name in there]
    if len(samples) < len(asked["samples"]) or _asked(samples) != asked["asked"]:
        raise UserError(
            f"task '{task.name}' has other samples on {platform.node()} than where the work comes from; "
            "give all machines the same files"
        )
    return samples


def _asked(samples: Sequence[Sample]) -> str:
    """A fingerprint of which samples these are, and what they ask."""
    return hashlib.sha256(json.dumps([[s.id, s.asked] for s in samples]).encode()).hexdigest()[:16]


def _split(batches: Sequence[Ask], wanted: int) -> list[Ask]:
    """About `wanted` tasks of batches, each by a part of the policies that it is to be answered under."""
    parts = -(-wanted // max(len(batches), 1))
    tasks = []
    for batch in batches:
        size = -(-len(batch.policies) // parts)
        for start in range(0, len(batch.policies), size):
            tasks.append(replace(batch, policies=batch.policies[start : start + size]))
    return tasks


def _joined(batches: Iterable[Ask], most: int) -> list[Ask]:
    """Batches of the same kind that follow each other, at most so many to a task."""
    tasks: list[Ask] = []
    count = 0
    for batch in batches:
        same = bool(tasks) and replace(tasks[-1], samples=()) == replace(batch, samples=())
        if same and count < min(most, MOST_BATCHES):
            tasks[-1] = replace(tasks[-1], samples=(*tasks[-1].samples, *batch.samples))
            count += 1
        else:
            tasks.append(batch)
            count = 1
    return tasks
