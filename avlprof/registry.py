"""Named strategies: built-in ones by module, third parties' by Python entry point."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from avlprof.errors import UserError, cut, shortened

T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest names that are."""
    known, name = sorted(known), cut(name, 100)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown {kind} '{name}'; {hint}")


class Registry(Generic[T]):
    """Maps names to objects that are imported only when asked for.

    `builtin` maps a name to `module:attribute`. Entry points of the group `avlprof.<kind>s`
    add names; a built-in name wins over an entry point of the same name.
    """

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._builtin = builtin

    def names(self) -> list[str]:
        """All known names, built-in ones first."""
        plugins = sorted(p.name for p in entry_points(group=self._group) if p.name not in self._builtin)
        return [*self._builtin, *plugins]

    def get(self, name: str) -> T:
        """The object of a name; `UserError` with the nearest names when it is not known."""
        if name in self._builtin:
            module, attribute = self._builtin[name].split(":")
            strategy: T = getattr(import_module(module), attribute)
            return strategy
        for plugin in entry_points(group=self._group):
            if plugin.name == name:
                loaded: T = plugin.load()
                return loaded
        raise unknown(self.kind, name, self.names())

    def make(self, name: str, options: Mapping[str, Any]) -> Any:
        """An object of the dataclass of a name, its options checked.

        Raises:
            UserError: the name or an option is not known, or a value is of another type than the
                option's default.
        """
        strategy: Any = self.get(name)
        defaults = {field.name: field.default for field in fields(strategy)}
        for option, value in options.items():
            if not defaults:
                raise UserError(f"{self.kind} '{name}' takes no options, got '{option}'")
            if option not in defaults:
                raise unknown(f"option of {self.kind} '{name}'", option, defaults)
            default = defaults[option]
            kind = (int, float) if isinstance(default, float) else type(default)
            if default is not MISSING and not isinstance(value, kind):
                raise UserError(
                    f"option {option} of {self.kind} '{name}' must be {type(default).__name__}, "
                    f"got {shortened(value)}"
                )
        return strategy(**options)

    @property
    def _group(self) -> str:
        return f"avlprof.{self.kind}s"
