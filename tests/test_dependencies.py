"""What is imported is declared in `pyproject.toml`, and what is declared is used."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit_learn": "sklearn"}
"""Import names of packages that are not called like their distribution."""

INDIRECT = {
    "bitsandbytes": "transformers quantises with it",
    "sklearn": "Optuna's fANOVA, the importances of a study, is a random forest of it",
    "psycopg": "the driver that SQLAlchemy loads for postgresql://",
    "ipykernel": "the kernel that nbclient starts for a notebook",
}
"""Packages that nothing here imports by name, and who needs them."""

UNDECLARED = {
    "kernels": "fetches attention kernels by name; asked for by find_spec before it is used",
    "pip": "downloads the language model of `small`; asked for by find_spec before it is run",
    "triton": "comes with CUDA builds of torch, and is asked for by find_spec before it is imported",
    "torchvision": "some processors of transformers need it; it must fit the torch that is installed",
}
"""Packages that are used where they happen to be there."""

TOOLS = {"build", "mypy", "pandas_stubs", "pytest_xdist", "ruff", "triton", "types_pyyaml"}
"""Part of the extra `dev` for their commands, plug-ins or type stubs, not for an import."""


def name_of(requirement: str) -> str:
    """The import name of a requirement such as `pillow>=10`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    plain = re.sub(r"[-.]", "_", name[0]).lower()
    return IMPORT_NAMES.get(plain, plain)


def declared(requirements: list[str]) -> set[str]:
    return {name_of(requirement) for requirement in requirements} - {"avlprof"}


def modules(tree: ast.AST) -> Iterator[str]:
    """Absolute modules that a file imports, or asks for by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "find_spec", "importorskip"):
                yield str(node.args[0].value)


def third_party(*folders: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Top-level packages imported below some folders, each with a file that does."""
    own = {"avlprof", "tests", "tools", "notebooks"}
    used: dict[str, str] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            if relative.startswith(without):
                continue
            siblings = {sibling.stem for sibling in path.parent.glob("*.py")}
            for module in modules(ast.parse(path.read_text(encoding="utf-8"))):
                name = module.split(".")[0]
                if name not in own | siblings and name not in sys.stdlib_module_names:
                    used.setdefault(name, relative)
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                code = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
                lines = [line for line in code.splitlines() if not line.startswith(("%", "!"))]
                for module in modules(ast.parse("\n".join(lines))):
                    name = module.split(".")[0]
                    if name not in own and name not in sys.stdlib_module_names:
                        used.setdefault(name, path.relative_to(ROOT).as_posix())
    return used


RUNTIME = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(needs) for name, needs in PROJECT["optional-dependencies"].items()}
DEVELOPMENT = set().union(*EXTRAS.values()) | RUNTIME
PACKAGE = third_party("avlprof", without=("avlprof/testing/",))
BESIDE = third_party("tests", "notebooks", "tools", "avlprof/testing")


def test_what_the_package_imports_is_declared():
    """In the dependencies, or in an extra that a user can ask for."""
    offered = RUNTIME.union(*(needs for name, needs in EXTRAS.items() if name not in ("dev", "docs")))
    # the search runs without cmaes, and names it when the sampler of that name is asked for
    known = offered | set(UNDECLARED) | {"cmaes"}
    assert {name: path for name, path in PACKAGE.items() if name not in known} == {}


def test_what_tests_and_tools_import_is_declared():
    known = DEVELOPMENT | set(UNDECLARED)
    assert {name: path for name, path in BESIDE.items() if name not in known} == {}


def test_every_dependency_is_used():
    assert sorted(RUNTIME - set(PACKAGE) - set(INDIRECT)) == []


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"docs"}))
def test_every_extra_is_used(extra):
    used = set(PACKAGE) | set(BESIDE) | set(INDIRECT)
    if extra == "dev":
        used |= TOOLS
    assert sorted(EXTRAS[extra] - used) == []


def test_the_tables_here_hold_nothing_else():
    """An exception that is no longer one has to go."""
    assert set(INDIRECT) <= DEVELOPMENT and not set(INDIRECT) & set(PACKAGE)
    assert EXTRAS["dev"] >= TOOLS
    assert not set(UNDECLARED) & RUNTIME and set(UNDECLARED) <= set(PACKAGE) | set(BESIDE)
