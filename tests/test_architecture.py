"""The package's rules about itself: who imports whom, how large files are, what starts quickly."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import avlprof
from tests.synthetic_run import write_run

ROOT = Path(avlprof.__file__).parent
TESTS = Path(__file__).parent
ORDER = (
    ("__init__", "__main__"),
    ("cli",),
    ("testing",),
    ("lmms",),
    ("bench",),
    ("api",),
    ("tuning",),
    ("evaluation",),
    ("report",),
    ("run",),
    ("explore",),
    ("plots",),
    ("analysis",),
    ("tracing", "runtime"),
    ("runs",),
    ("models",),
    ("tasks",),
    ("budgets",),
    ("scorers", "allocators"),
    ("attention",),
    ("policy",),
    ("launchers",),
    ("_lazy", "bisection", "files", "locks", "registry", "versions", "watch"),
    ("errors",),
)
"""Parts of the package from top to bottom, as `docs/design.md` lists them; those of one line are
siblings, which do not know each other. The root hands out names and is imported by nobody."""

RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
MODULES = sorted(ROOT.rglob("*.py"))
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "optuna", "pyarrow")

LARGEST, SMALLEST = 350, 60
SIBLINGS = (
    "allocators",
    "cli",
    "launchers",
    "models/families",
    "plots",
    "scorers",
    "tasks/metrics",
    "tasks/presets",
    "testing",
    "tuning/storages",
)
"""Folders whose files are siblings of a contract, one idea each, as short as it is."""
GROUND = {
    *(f"{name}.py" for parts in ORDER[-2:] for name in parts),
    "__main__.py",
    "models/spec.py",  # which model, as it travels
    "tasks/spec.py",  # which task, as it travels
    "tasks/splits.py",  # the names of splits
    "analysis/statistics.py",  # the names of a profile's tables
    "runtime/support.py",  # the one list of what the runtime cannot do, which imports no torch
}
"""Ground stones: what many files stand on, and belongs to none of them."""


def within(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(tree: ast.AST, types: bool = True) -> Iterator[ast.AST]:
    """Every node of a file, also inside functions; without `types`, none of what type checkers alone read."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if types or not only_for_types(node):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def imported(path: Path, package: list[str], types: bool = True) -> Iterator[tuple[int, str, str]]:
    """Line, absolute module and name of every import of a file; the name is empty for `import module`."""
    for node in nodes(tree_of(path), types):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import of a file of the package."""
    for line, module, name in imported(path, ["avlprof", *path.relative_to(ROOT).parts[:-1]]):
        # `from avlprof import plots` imports a part, and nobody imports a name of the root
        yield line, f"avlprof.{name}" if module == "avlprof" and name else module


def attributes(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every `name.attribute` in a file."""
    for node in nodes(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


# --- who imports whom


def test_every_part_has_its_place():
    assert {part_of(path) for path in MODULES} == set(RANK)


def test_imports_point_down():
    wrong = []
    for path in MODULES:
        own = part_of(path)
        for line, name in imports(path):
            package, _, rest = name.partition(".")
            theirs = rest.partition(".")[0]
            if package == "avlprof" and theirs != own and RANK.get(theirs, -1) <= RANK[own]:
                wrong.append(f"{within(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_root_is_not_used_inside():
    """`import avlprof` inside the package would open a way around the order."""
    wrong = [
        f"{within(path)}:{line} uses {name}"
        for path in MODULES
        for line, name in attributes(path)
        if name.startswith("avlprof.")
    ]
    assert not wrong, "\n".join(wrong)


def lazy_names(tree: ast.Module) -> dict[str, str]:
    """Names that a package hands over when asked, and the modules that hold them."""
    pairs = [
        (key.value, value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    ]
    return {str(name): str(home) for name, home in pairs if str(home).startswith("avlprof.")}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other, after Tarjan."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1 or name in edges[name]:
                groups.append(sorted(group))

    for name in edges:
        if name not in order:
            visit(name)
    return groups


def test_no_files_import_each_other():
    """Imports inside functions count, those for type checkers alone do not."""
    files = {
        ".".join(["avlprof", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in MODULES
    }
    lazy = {name: lazy_names(tree_of(path)) for name, path in files.items() if path.name == "__init__.py"}
    edges: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        package = ["avlprof", *path.relative_to(ROOT).parts[:-1]]
        for _, module, what in imported(path, package, types=False):
            submodule = f"{module}.{what}"
            home = submodule if submodule in files else lazy.get(module, {}).get(what, module)
            if home in files:
                edges[name].add(home)
    assert circles(edges) == []


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": set(), "f": {"f", "a"}}
    assert sorted(circles(edges)) == [["b", "c"], ["f"]]


def test_tests_import_no_test():
    """What tests share has a file of its own: conftest, helpers, policies, ..."""
    wrong = []
    for path in sorted(TESTS.rglob("*.py")):
        package = ["tests", *path.relative_to(TESTS).parts[:-1]]
        for line, module, name in imported(path, package):
            parts = [*module.split("."), name]
            if parts[0] == "tests" and any(part.startswith("test_") for part in parts):
                wrong.append(f"{path.relative_to(TESTS)}:{line} imports {module} {name}".rstrip())
    assert not wrong, "\n".join(wrong)


# --- what files are


def test_nothing_unpickles_or_shows_a_figure():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "torch.save", "plt.show", "np.load", "pd.read_pickle"}
    wrong = []
    for path in MODULES:
        for line, name in imports(path):
            if name.split(".")[0] in modules:
                wrong.append(f"{within(path)}:{line} imports {name}")
        for line, name in attributes(path):
            if name in calls:
                wrong.append(f"{within(path)}:{line} uses {name}")
    assert not wrong, "\n".join(wrong)


def lengths() -> dict[str, int]:
    return {within(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}


def test_modules_stay_small():
    large = {name: count for name, count in lengths().items() if count > LARGEST}
    assert not large, f"above {LARGEST} lines, of {len(MODULES)} modules: {large}"


def test_modules_are_worth_a_file():
    """A short module is a sibling of a contract or a ground stone, or it belongs to its neighbour."""
    small = {
        name: count
        for name, count in lengths().items()
        if count < SMALLEST
        and name not in GROUND
        and not name.endswith("__init__.py")
        and not name.startswith(tuple(f"{folder}/" for folder in SIBLINGS))
    }
    assert not small, f"below {SMALLEST} lines, of {len(MODULES)} modules: {small}"


def test_every_module_says_what_it_is():
    silent = [within(path) for path in MODULES if not ast.get_docstring(tree_of(path))]
    assert silent == []


# --- what starts quickly


@pytest.mark.full  # a process of its own
def test_light_parts_import_nothing_heavy():
    program = f"""
import sys

def loaded(names):
    return sorted(name for name in names if name in sys.modules)

import avlprof, avlprof.cli
assert not loaded({HEAVY!r}), loaded({HEAVY!r})
import avlprof.runs, avlprof.policy, avlprof.allocators
assert not loaded(("torch", "transformers", "optuna", "matplotlib")), "runs, policy or allocators"
import avlprof.tuning.reading, avlprof.tuning.settings, avlprof.tuning.trials
import avlprof.tuning.importance
assert not loaded(("torch", "transformers", "matplotlib", "sklearn")), "looking at a study"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # a process of its own draws all figures
def test_a_run_is_analyzed_and_reported_without_torch(tmp_path):
    """Neither opening a run, nor its profile, figures and report load a model library."""
    write_run(tmp_path / "run", vision=(5, 4))
    program = f"""
import sys

def check(what):
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    assert not heavy, (what, heavy)

import avlprof.analysis, avlprof.run, avlprof.report
import avlprof.cli.analyze, avlprof.cli.report, avlprof.cli.explore
check("import")
from typer.testing import CliRunner
from avlprof.cli._app import app
derive = ["derive", "--budget", "0.8"]
for words in (["analyze", "--figures"], ["report", "--policy", "uniform"], ["explore"], derive):
    done = CliRunner().invoke(app, [words[0], {str(tmp_path / "run")!r}, *words[1:]])
    assert done.exit_code == 0, done.output
    check(words)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()


# --- what is public


def test_public_names():
    assert avlprof.__all__ == sorted(avlprof.__all__)
    assert set(avlprof.__all__) <= set(dir(avlprof))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = avlprof.nonsense


@pytest.mark.parametrize("name", avlprof.__all__)
def test_public_name_is_documented(name):
    """It exists, is what type checkers are told it is, and has a docstring of its own."""
    found = getattr(avlprof, name)
    own = found.__doc__ or ""
    assert len(own.strip().splitlines()[0]) > 20, name
    assert not own.startswith(f"{name}("), "a dataclass without a docstring shows its signature"
    told = {
        alias.asname or alias.name: node.module
        for node in nodes(tree_of(Path(avlprof.__file__)))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("avlprof.")
        for alias in node.names
    }
    module = __import__(str(told[name]), fromlist=[name])
    assert getattr(module, name) is found
    if inspect.isclass(found):
        silent = [
            method
            for method, value in vars(found).items()
            if not method.startswith("_")
            and (inspect.isfunction(value) or isinstance(value, property | classmethod))
            and not inspect.getdoc(getattr(found, method) if isinstance(value, classmethod) else value)
        ]
        assert silent == [], name
