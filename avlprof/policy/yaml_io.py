"""Policies as YAML files: load, dump (byte-stable), and find by name or path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from avlprof.errors import UserError, cut, shortened
from avlprof.files import checked_path, write_text
from avlprof.policy.schema import DENSE, Policy
from avlprof.policy.strict_yaml import read_yaml
from avlprof.registry import unknown


class _Dumper(yaml.SafeDumper):
    """Block mappings, lists of numbers on one line."""


def _inline_list(dumper: _Dumper, data: Any) -> yaml.Node:
    flow = all(not isinstance(item, dict) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", list(data), flow_style=flow)


_Dumper.add_representer(list, _inline_list)
_Dumper.add_representer(tuple, _inline_list)


def dump_policy(policy: Policy) -> str:
    """The YAML text of a policy: fields in schema order, defaults left out."""
    data = policy.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    data = {"schema": policy.schema_, "name": policy.name} | data
    if isinstance(data.get("scorer"), dict) and not data["scorer"].get("options"):
        data["scorer"] = policy.scorer.name
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def save_policy(policy: Policy, path: Path | str) -> Path:
    """Write a policy atomically; returns the path."""
    path = Path(path)
    write_text(path, dump_policy(policy))
    return path


def parse_policy(text: str, origin: str = "policy") -> Policy:
    """A policy from YAML text; `UserError` names field, value and `origin`."""
    data = read_yaml(text, origin)
    if not isinstance(data, dict):
        raise UserError(f"{origin} must hold a mapping of policy fields, got {type(data).__name__}")
    if "schema" not in data:
        raise UserError(f"schema is missing; write 'schema: {DENSE.schema_}' ({origin})")
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{cut(_first_problem(error))} ({cut(origin, 200)})") from None
    except (RecursionError, OverflowError) as error:
        raise UserError(f"{cut(origin, 200)} holds a value that cannot be read: {error}") from None


def load_policy(path: Path | str) -> Policy:
    """A policy from a YAML file."""
    path = checked_path(path, "policy file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"policy file {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"policy file {path} is no text in UTF-8") from None
    except OSError as error:
        raise UserError(f"policy file {path} cannot be read: {error.strerror or error}") from None
    return parse_policy(text, str(path))


def shipped() -> dict[str, Path]:
    """The policies that come with avlprof, by name (`paper/a-vl`; baselines without their folder)."""
    package = Path(__file__).resolve().parent.parent
    folder = next((f for f in (package / "policies", package.parent / "policies") if f.is_dir()), None)
    if folder is None:
        return {}
    paths = sorted(folder.rglob("*.yaml"))
    return {p.relative_to(folder).with_suffix("").as_posix().removeprefix("baselines/"): p for p in paths}


def find_policy(name: str) -> Policy:
    """A policy by file path, by the name of a shipped one, or `dense`."""
    if name == DENSE.name:
        return DENSE
    path = checked_path(name, "policy")
    if path.suffix in (".yaml", ".yml") or path.exists():
        return load_policy(path)
    known = shipped()
    if name not in known:
        raise unknown("policy", name, [DENSE.name, *known])
    return load_policy(known[name])


def _first_problem(error: ValidationError) -> str:
    """One sentence for the first problem pydantic found."""
    problems = error.errors()
    same = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]]
    first = max(same, key=lambda p: (p["type"] == "extra_forbidden", len(p["loc"])))
    key = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_key(cut(key, 100))
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{key}: {message[0].lower()}{message[1:]}, got {shortened(first['input'])}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    """`text.window` or `vision_keep[3]`; the members of a union that pydantic tried are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif "[" not in part and not (text and part in ("float", "int")):
            text += f".{part}" if text else part
    return text


def _unknown_key(path: str) -> str:
    """A key that its section does not have, and the nearest ones: of the section, else of all."""
    section, _, key = re.sub(r"\[\d+\]", "", path).rpartition(".")
    sections = _sections(Policy)
    everywhere = [(name, f"{part}.{name}".lstrip(".")) for part, names in sections.items() for name in names]
    own = [(name, f"{section}.{name}".lstrip(".")) for name in sections.get(section, ())]
    for choice in (own, everywhere):
        near = difflib.get_close_matches(key, dict(choice), n=3, cutoff=0.62)
        if near:
            listed = " or ".join(full for match in near for name, full in choice if name == match)
            return f"unknown policy key '{path}'; did you mean {listed}?"
    return f"unknown policy key '{path}'" + (f"; known: {', '.join(full for _, full in own)}" if own else "")


def _sections(model: type[BaseModel], name: str = "") -> dict[str, list[str]]:
    """Keys of every section of the schema by its dotted name; the top level is the empty name."""
    sections = {name: [field.alias or key for key, field in model.model_fields.items()]}
    for key, field in model.model_fields.items():
        inner = f"{name}.{key}" if name else key
        for part in _models_in(field.annotation):
            sections |= _sections(part, inner)
    return sections


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside `Model | None` or `tuple[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
