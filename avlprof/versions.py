"""The version of this package, and those of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Python's and the main packages' versions, by name."""
    known = {"python": platform.python_version(), "avlprof": __version__}
    for package in ("torch", "transformers", "optuna"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known
