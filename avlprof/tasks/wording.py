"""How the row of a dataset is put to a model: a template of the prompt, and multiple choice."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from avlprof.errors import UserError

CHOICES = "choices"
"""Place in a template where the lettered options go."""


@dataclass(frozen=True)
class Wording:
    """A template of prompts with places for columns, such as `{question}`.

    A line of the template whose places are all empty in a row is left out of that row's prompt.
    `choices` names the column with the options of a multiple-choice question: they are written
    as `A. ...`, one a line, at the place `{choices}`, and the answer, an index into them (a number
    or its digits), becomes a letter.

    Raises:
        UserError: the template is malformed, or has `{choices}` without the column, or the other
            way round.
    """

    template: str
    choices: str | None = None

    def __post_init__(self) -> None:
        if (CHOICES in self.names()) != (self.choices is not None):
            raise UserError(f"a prompt template needs {{{CHOICES}}} and the column of choices, or neither")

    def names(self) -> tuple[str, ...]:
        """Names between braces, in order."""
        try:
            return tuple(name for _, name, _, _ in string.Formatter().parse(self.template) if name)
        except ValueError as error:
            raise UserError(f"prompt template {self.template!r} is malformed: {error}") from None

    def columns(self) -> set[str]:
        """Columns that prompts and answers are made from."""
        own = {name for name in self.names() if name != CHOICES}
        return own | ({self.choices} if self.choices else set())

    def prompt(self, row: Mapping[str, object]) -> str:
        """The prompt of a row."""
        values = {name: "" if value is None else str(value).strip() for name, value in row.items()}
        if self.choices:
            values[CHOICES] = "\n".join(
                f"{_letter(i)}. {option}" for i, option in enumerate(self._options(row))
            )
        lines = []
        for line in self.template.split("\n"):
            names = Wording(line, self.choices if f"{{{CHOICES}}}" in line else None).names()
            if not names or any(values[name] for name in names):
                lines.append(line.format_map(values))
        return "\n".join(lines)

    def answer(self, cell: object, row: Mapping[str, object]) -> object:
        """The answer in the form that the prompt asks for: a letter in multiple choice."""
        if not self.choices or cell is None:
            return cell
        options = self._options(row)
        text = str(cell).strip()
        if not text.isdigit() or int(text) >= len(options):
            raise UserError(f"the answer must be an index into {len(options)} choices, got {cell!r}")
        return _letter(int(text))

    def _options(self, row: Mapping[str, object]) -> list[object]:
        options = row[self.choices] if self.choices else None
        if not isinstance(options, list | tuple):
            raise UserError(f"column '{self.choices}' must hold a list of choices, got {options!r}")
        return list(options)


def _letter(index: int) -> str:
    return string.ascii_uppercase[index]
