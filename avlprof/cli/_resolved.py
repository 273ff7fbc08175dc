"""Policies that leave the shares of layers to an allocator, worked out for the model at hand."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from avlprof.cli._output import note

if TYPE_CHECKING:
    from avlprof.allocators._base import Evidence
    from avlprof.models import LoadedModel
    from avlprof.policy import Policy
    from avlprof.tasks import Task

TRACED_SAMPLES = 32


def named_policies(names: list[str]) -> list[Policy]:
    """The policies of files and shipped names; what is from a file says so where names alone do not tell.

    Two files may hold policies of one name; then the files stand in the tables.
    """
    from avlprof.policy import find_policy

    policies = [find_policy(name) for name in names]
    titles = [policy.name for policy in policies]
    named = []
    for name, policy in zip(names, policies, strict=True):
        if titles.count(policy.name) > 1 and policy.name != name:
            policy = policy.model_copy(update={"name": f"{policy.name} ({name})"[:200]})
        elif policy.name != name and Path(name).exists():
            note(f"{policy.name}: {name}")
        named.append(policy)
    return named


class Resolver:
    """Works out the shares of layers from the number of layers, else from a traced run.

    The run is the one given, else the newest of this model and task, else one that is made now.
    """

    def __init__(self, loaded: LoadedModel, task: Task, run: Path | None = None) -> None:
        self._loaded, self._task, self._run = loaded, task, run

    def __call__(self, policy: Policy) -> Policy:
        """The policy with a share for each layer; `UserError` when its allocator finds no evidence."""
        from avlprof.budgets.resolve import resolve, resolve_by_depth
        from avlprof.errors import UserError

        if policy.allocator is None:
            return policy
        try:
            adapter = self._loaded.adapter
            return resolve_by_depth(policy, adapter.layers, adapter.governed)
        except UserError:
            return resolve(policy, self.evidence)

    @cached_property
    def evidence(self) -> Evidence:
        """What the profile of the run knows."""
        from avlprof.api.trace import trace
        from avlprof.run import Run, latest_run

        loaded, task = self._loaded, self._task
        traced = Run.open(self._run) if self._run else latest_run(loaded=loaded, task=task.name)
        if traced is None:
            few = len(task.samples("search", TRACED_SAMPLES))
            note(f"tracing {few} samples for the policies that need a profile")
            traced = trace(loaded, task, few)
        else:
            note(f"shares of layers from run {traced.path}")
        traced.check_model(loaded)
        return traced.profile().evidence("store")
