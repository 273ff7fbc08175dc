"""What a policy becomes where another engine runs it: the file, what it says, and what is lost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from types import MappingProxyType
from typing import Any, Final

from avlprof.errors import UserError, cut, shortened
from avlprof.policy.parts import of_layer
from avlprof.policy.schema import Policy
from avlprof.policy.sizes import LayerSizes, PromptShape, acts_on, sizes
from avlprof.versions import __version__

WIDTH: Final = 100
"""Characters of a line of what a file says at its head."""

DESCRIBES: Final = frozenset(("schema", "name", "description", "source", "provenance"))
"""Fields that say what a policy is, and not what it does."""

LOST: Final[Mapping[str, str]] = {
    "vision_compute": "every step attends to all that is kept; there is no core",
    "refresh_interval": "without a core there is nothing to refresh",
    "refresh": "without a core there is nothing to refresh",
    "refresh_margin": "without a core there is nothing to refresh",
    "refresh_layers": "without a core there is nothing to refresh",
    "core_score": "without a core there is nothing to refresh",
    "vision_bits": "what is kept stays in the precision of the cache",
    "text.bits": "text stays in the precision of the cache",
    "text.window": "all text stays, and every generated token",
    "text.sink": "all text stays",
    "text.heavy": "all text stays",
    "text.keep": "all text stays, and every generated token",
    "text.minimum": "all text stays",
    "text.recent": "all text stays",
    "text.scorer": "all text stays",
    "prefill_filter": "all tokens pass all layers of the prompt; layers behind the filter keep as few of "
    "them, each by a ranking of its own",
    "joint.decoding": "the pool grows by every generated token",
    "heads": "one set of tokens a layer, shared by its heads",
}
"""What it means that a target does not express a field, by the field's dotted name."""


@dataclass(frozen=True)
class Case:
    """A policy that says the share of every layer, the layers of its model, and a prompt, if one is known."""

    policy: Policy
    layers: int
    prompt: PromptShape | None = None

    @property
    def governed(self) -> tuple[int, ...]:
        """The layers that the policy acts on: all, unless its provenance says otherwise."""
        acts = acts_on(self.policy)
        return tuple(range(self.layers)) if acts is None else acts

    def shares(self) -> list[float]:
        """What each layer keeps of a prompt's vision tokens, in a joint pool of all; 1 if not governed."""
        policy = self.policy
        kept = (
            [float(of_layer(policy.joint.keep, i)) for i in range(self.layers)]
            if policy.joint
            else [
                min(share, *(step.keep for step in policy.prefill_filter if step.after_layer <= layer), 1.0)
                for layer, share in enumerate(policy.keep(self.layers))
            ]
        )
        return [share if layer in self.governed else 1.0 for layer, share in enumerate(kept)]

    def counted(self, target: str) -> tuple[PromptShape, list[LayerSizes]]:
        """The prompt, and what each layer keeps of it; `UserError` without one."""
        if self.prompt is None:
            raise UserError(
                f"{target} counts tokens, not shares: give --tokens SYSTEM,VISION,TEXT of a typical prompt, "
                "such as 14,576,30, or a traced run"
            )
        return self.prompt, sizes(self.policy, self.prompt, self.layers)


class Target(ABC):
    """An engine, or a library, that a policy is handed to: one file a target.

    `write` is asked once, after `check` and with what is lost already known; it returns the whole file.
    """

    name: str
    source: str
    """Project, version and place that the format was read from."""
    suffix: str
    expresses: Mapping[str, tuple[Any, ...] | None]
    """Dotted names of the fields that the target can say, and the values that it can; None: all."""
    says: Mapping[str, str] = MappingProxyType({})
    """What it means that this target does not express a field, where it differs from `LOST`."""

    @abstractmethod
    def check(self, case: Case) -> None:
        """`UserError` when nothing useful of the policy would be left."""

    @abstractmethod
    def write(self, case: Case, lost: tuple[str, ...]) -> str:
        """The text of the file, with what is lost at its head."""

    def lost(self, case: Case) -> Iterator[str]:
        """What the target cannot say of a policy, a sentence a field; a target adds its own."""
        for name, value in said(case.policy):
            able = self.expresses.get(name, ())
            if able is None or value in able:
                continue
            means = {**LOST, **self.says}.get(name, f"{self.name} has nothing like it")
            yield f"{name}: {shortened(value, 40)}: {means}"


@dataclass(frozen=True)
class Handover:
    """A policy as a target reads it: the text of the file, how its name ends, and what is lost."""

    target: str
    text: str
    suffix: str
    lost: tuple[str, ...]


def said(policy: Policy) -> list[tuple[str, Any]]:
    """What a policy says beside its defaults, by dotted name: `text.window`, `scorer.name`."""
    plain = policy.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=set(DESCRIBES))
    fields: list[tuple[str, Any]] = []
    for name, value in plain.items():
        if isinstance(value, dict) and name != "allocator":
            fields += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            fields.append((name, value))
    return fields


def ranking(policy: Policy) -> str:
    """The scorer in words: `valued:instruction`."""
    inner = policy.scorer.options.get("of")
    return f"{policy.scorer.name}:{inner}" if inner else policy.scorer.name


def head(case: Case, target: Target, lost: tuple[str, ...]) -> list[str]:
    """The lines that each file begins with: what it is, of which policy, and what is lost."""
    policy = case.policy
    lines = [
        f"Policy '{cut(policy.name, 80)}' of avlprof {__version__} ({policy.hash}) for {target.source}.",
        f"{case.layers} layers, ranked by {ranking(policy)}.",
    ]
    if case.prompt is not None:
        shape = case.prompt
        lines.append(
            f"Counts are of a prompt of {shape.system} system, {shape.vision} vision and {shape.text} text "
            "tokens."
        )
    lines += ["", "Lost on the way:" if lost else "Nothing is lost on the way."]
    plain = [part for line in lines for part in wrap(printable(line), WIDTH) or [""]]
    return plain + [
        part for line in lost for part in wrap(f"- {printable(line)}", WIDTH, subsequent_indent="  ")
    ]


def printable(text: str) -> str:
    """A text that ends neither a comment nor a docstring: one line, without double quotes or backslashes."""
    plain = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return plain.replace("\\", "/").replace('"', "'")


def listed(values: Sequence[float], indent: int = 0) -> str:
    """A list over several lines, as Python and YAML read it; lines after the first are indented so far."""
    pad = " " * indent
    rows = [", ".join(repr(value) for value in values[at : at + 8]) for at in range(0, len(values), 8)]
    return "[\n" + "".join(f"{pad}    {row},\n" for row in rows) + f"{pad}]"
