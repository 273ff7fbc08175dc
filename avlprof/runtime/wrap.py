"""A model that stays under a policy until it is told otherwise, for code that has no place for a context."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Generic, TypeVar

from avlprof.attention.gate import unwrapped
from avlprof.errors import UserError
from avlprof.policy import Policy
from avlprof.runtime.apply import apply

Model = TypeVar("Model")
NAME = "unwrap"


class Unwrap(Generic[Model]):
    """Gives a wrapped model back as it was; `runtime` is what `apply` yields. A copy of a model has none."""

    def __init__(self, model: Model, policy: Policy | str | Path, captured: int | None) -> None:
        self._model = model
        self._contexts = contextlib.ExitStack()
        self.runtime = self._contexts.enter_context(apply(unwrapped(model), policy, captured))

    def __call__(self) -> Model:
        """End the policy; what `apply` does on exit."""
        vars(self._model).pop(NAME, None)
        self._contexts.close()
        return self._model

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _not_wrapped


def _not_wrapped() -> Any:
    raise UserError("this is a copy of a wrapped model, which is under no policy; unwrap the original")


def wrap(model: Model, policy: Policy | str | Path, captured: int | None = None) -> Model:
    """Put a model under a policy for good, and return it: `apply` without a context.

    The model is the same object with one more attribute, `unwrap`, a method that ends it and returns the
    model as it was; `model.unwrap.runtime` has the cache of the latest prompt. Its config, generation
    config and weights are untouched, so `save_pretrained` writes a stock model; its copies are stock
    models too. A wrapped model is kept in memory until it is unwrapped.

    Args:
        policy: a `Policy`, a YAML file, or the name of a shipped one.
        captured: as in `apply`.

    Raises:
        UserError: as `apply`; the model is under a policy already.
    """
    vars(model)[NAME] = Unwrap(model, policy, captured)
    return model
