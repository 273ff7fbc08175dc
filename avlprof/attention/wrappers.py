"""What people wrap around a model of transformers: taken off, and compiled calls kept from running."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from avlprof.errors import UserError


def unwrapped(model: Any) -> Any:
    """The model of transformers inside wrappers: PEFT, `torch.compile`, data parallel.

    Adapters of PEFT are part of the model's layers and stay at work.

    Raises:
        UserError: there is none inside.
    """
    for _ in range(8):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), torch.nn.Module) and not hasattr(model, "config"):
            model = model.module
        else:
            break
    if not hasattr(model, "config") or not hasattr(model.config, "get_text_config"):
        raise UserError(f"{type(model).__name__} is not a model of transformers; give the model itself")
    return model


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled calls run uncompiled inside, if anything is compiled in this process.

    What was traced by the compiler does not ask for the attention function any more.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
