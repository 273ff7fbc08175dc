"""Exported names of a package that are imported when first asked for.

What lists aliases, opens a run or looks at a study must not wait seconds for torch; so packages
whose names need it hand them over by `__getattr__`, after PEP 562.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: the package's `__name__`.
        homes: for each exported name the full name of the module that holds it. A name must not be
            that of a submodule, which would hide it as soon as it is imported.
    """

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return getattribute, lambda: sorted(homes)
