"""The package's rules about itself: who imports whom, what is never used, what starts quickly."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import avlprof
from tests.synthetic_run import write_run

ROOT = Path(avlprof.__file__).parent
ORDER = (
    ("__main__",),
    ("cli",),
    ("lmms",),
    ("bench",),
    ("api",),
    ("tuning",),
    ("evaluation",),
    ("report",),
    ("run",),
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
    ("_lazy", "bisection", "files", "locks", "registry", "versions", "watch"),
    ("errors",),
)
"""Parts of the package from top to bottom, as `docs/design.md` lists them; those of one line are
siblings, which do not know each other."""

RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
MODULES = sorted(ROOT.rglob("*.py"))
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "optuna", "pyarrow")


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in a file, also of those inside functions."""
    package = ["avlprof", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from avlprof import plots` imports a part
            if module == "avlprof":
                yield from ((node.lineno, f"avlprof.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def attributes(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every `name.attribute` in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


def test_every_part_has_its_place():
    parts = {part_of(path) for path in MODULES} - {"__init__", "testing"}
    assert parts == set(RANK)


def test_imports_point_down():
    wrong = []
    for path in MODULES:
        own = part_of(path)
        if own in ("__init__", "testing"):
            continue
        for line, name in imports(path):
            theirs = name.split(".")[1] if name.startswith("avlprof.") else None
            if theirs in (None, own):
                continue
            if theirs not in RANK or RANK[theirs] <= RANK[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_root_is_not_used_inside():
    """`import avlprof` inside the package must not open a way around the order."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} uses {name}"
        for path in MODULES
        for line, name in attributes(path)
        if name.startswith("avlprof.")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles_or_shows_a_figure():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "torch.save", "plt.show", "np.load", "pd.read_pickle"}
    wrong = []
    for path in MODULES:
        for line, name in imports(path):
            if name.split(".")[0] in modules:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
        for line, name in attributes(path):
            if name in calls:
                wrong.append(f"{path.relative_to(ROOT)}:{line} uses {name}")
    assert not wrong, "\n".join(wrong)


def test_modules_stay_small():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert {name: count for name, count in lengths.items() if count > 350} == {}


def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


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


def test_a_run_is_analyzed_and_reported_without_torch(tmp_path):
    """Neither opening a run, nor its profile, figures and report load a model library."""
    write_run(tmp_path / "run", vision=(5, 4))
    program = f"""
import sys

def check(what):
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    assert not heavy, (what, heavy)

import avlprof.analysis, avlprof.run, avlprof.report, avlprof.cli.analyze, avlprof.cli.report
check("import")
from typer.testing import CliRunner
from avlprof.cli._app import app
for words in (["analyze", "--figures"], ["report", "--policy", "uniform"], ["derive", "--budget", "0.8"]):
    done = CliRunner().invoke(app, [words[0], {str(tmp_path / "run")!r}, *words[1:]])
    assert done.exit_code == 0, done.output
    check(words)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()


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
        for node in ast.walk(ast.parse(Path(avlprof.__file__).read_text(encoding="utf-8")))
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
