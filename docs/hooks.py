"""What the site has beside the pages of this folder: the API reference, and two files of the root.

MkDocs calls `on_config`, `on_files` and `on_post_page`. The reference is made by walking the package,
a page a package of modules, so no name in it is typed by hand. Docstrings are read from the source
by mkdocstrings; nothing of avlprof is imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
COMMAND_LINE = ("cli", "__main__")
"""Parts without a Python interface; docs/cli.md describes them."""

BEHIND_PROSE = "---\nsearch:\n  boost: 0.5\n---\n\n"
"""What explains a word is found before what defines a name of it."""


@dataclass(frozen=True)
class Page:
    """A page of the reference: its path below docs/, its name in the menu, its Markdown."""

    path: str
    title: str
    text: str


def summary(thing: griffe.Object | griffe.Alias) -> str:
    """The first line of a docstring."""
    return thing.docstring.value.splitlines()[0] if thing.docstring else ""


def target(name: str, thing: griffe.Object | griffe.Alias) -> str:
    return f"[`{name}`][{thing.canonical_path}]"


def home(root: griffe.Module, path: str) -> griffe.Object | griffe.Alias:
    """Where a name is defined: imports are followed, since a module may have the name of a function in it.

    `avlprof.tracing.record` is the function that the package imports, not the file beside it.
    """
    while True:
        parent, _, name = path.rpartition(".")
        package = root if parent == root.path else root[parent.removeprefix(f"{root.path}.")]
        imported = package.imports.get(name)
        if imported == path or not str(imported).startswith(f"{root.path}."):
            return package.members[name]
        path = str(imported)


def public_names(root: griffe.Module) -> Page:
    homes = {str(name): home(root, f"{root.path}.{name}") for name in root.exports or []}
    rows = [
        f"| {target(name, homes[name])} | {summary(homes[name])} |" for name in sorted(homes, key=str.lower)
    ]
    text = [
        "# Public names",
        "What `import avlprof` offers. [From Python](../python.md) shows each of them at work. "
        "The pages beside this one list every module, package by package.",
        "| name | what it is for |\n|---|---|\n" + "\n".join(rows),
    ]
    return Page("reference/index.md", "Public names", "\n\n".join(text) + "\n")


def exported_from(root: griffe.Module, package: griffe.Module) -> set[str]:
    """Modules of a package that hold what it exports; private ones are among them."""
    homes = {home(root, f"{package.path}.{name}").canonical_path for name in package.exports or []}
    return {path.rpartition(".")[0] for path in homes}


def shown(module: griffe.Module, exported: set[str]) -> bool:
    """Whether a module belongs into the reference: a public one with a public definition."""
    if module.name.startswith("_") and module.path not in exported:
        return False
    return any(
        not name.startswith("_") and not member.is_alias and member.has_docstring
        for name, member in module.members.items()
    )


def package_page(package: griffe.Module, modules: list[griffe.Module]) -> Page:
    name = package.path.removeprefix("avlprof.")
    title = "root modules" if name == package.path else name
    text = [f"# {package.path}", package.docstring.value if package.docstring else ""]
    text += [
        "| module | holds |\n|---|---|\n"
        + "\n".join(f"| {target(module.name, module)} | {summary(module)} |" for module in modules)
    ]
    text += [f"::: {module.path}" for module in modules]
    return Page(f"reference/{name}.md", title, "\n\n".join(text) + "\n")


def pages() -> list[Page]:
    """All pages of the reference, the public names first."""
    root = griffe.load("avlprof", search_paths=[str(ROOT)])
    assert isinstance(root, griffe.Module)
    made = [public_names(root)]
    waiting = [root]
    while waiting:
        package = waiting.pop(0)
        below = {name: module for name, module in package.modules.items() if not module.is_alias}
        if package is root:
            below = {name: module for name, module in below.items() if name not in COMMAND_LINE}
        waiting += [module for module in below.values() if module.is_package or module.is_subpackage]
        exported = exported_from(root, package)
        plain = [m for m in below.values() if not m.is_subpackage and shown(m, exported)]
        if plain:
            made.append(package_page(package, sorted(plain, key=lambda module: module.name)))
    return [*made[:2], *sorted(made[2:], key=lambda page: page.title)]  # the root comes first


_pages: list[Page] = []


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference into the menu, before the last entry."""
    _pages[:] = pages()
    assert config.nav is not None
    reference = [page.path if page is _pages[0] else {page.title: page.path} for page in _pages]
    config.nav.insert(len(config.nav) - 1, {"Reference": reference})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of this folder."""
    for page in _pages:
        files.append(File.generated(config, page.path, content=BEHIND_PROSE + page.text))
    for path, source in ROOT_PAGES.items():
        # a link of the root's file is relative to the root
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output: str, **_: object) -> str:
    """Refuse a page that would fetch something from a network to be shown."""
    remote = re.search(r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="?(?:https?:)?//[^">]*', output)
    if remote:
        raise PluginError(f"the site must be readable without a network, got {remote[0]}")
    return output
