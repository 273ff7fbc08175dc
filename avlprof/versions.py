"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Python's and the main packages' versions, by name."""
    known = {"python": platform.python_version()}
    for package in ("avlprof", "torch", "transformers", "optuna"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known
