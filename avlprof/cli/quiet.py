"""Keeps the chatter of libraries off stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings and no logs of other libraries inside; avlprof's own warnings as single lines.

    What the environment sets by itself wins, and everything is as before on exit.
    """
    set_here = {name: value for name, value in _QUIET.items() if name not in os.environ}
    root, own = logging.getLogger(), logging.getLogger("avlprof")
    silent, told = logging.NullHandler(), logging.StreamHandler()
    told.setFormatter(logging.Formatter("warning: %(message)s"))
    told.setLevel(logging.WARNING)
    os.environ.update(set_here)
    root.addHandler(silent)
    own.addHandler(told)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(told)
        root.removeHandler(silent)
        for name in set_here:
            os.environ.pop(name, None)
