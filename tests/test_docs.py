"""The documentation: its Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import pytest
import torch

from avlprof.cli._app import COMMANDS
from tests.helpers import ROOT, thinned

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
RUN = ("docs/python.md", "docs/runtime.md", "docs/first-hour.md", "README.md")
"""Pages whose blocks are one program, run in order."""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own for whatever the page writes, and one thread: the tensors are small."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", thinned(RUN, ("docs/runtime.md", "README.md"), ()))
def test_the_blocks_of_a_page_run(page, elsewhere):
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        # blank lines put the block at its own line of the page, for the traceback
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(ROOT / page), "exec"), names)
    assert not plt.get_fignums(), "a figure is returned, not left in pyplot"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_readme_is_for_a_newcomer():
    """How to install, how long things take, what speed was measured on; no file or command is missing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for said in ("pip install", "takes about", "one CPU thread", "avlprof demo"):
        assert said in text
    commands = re.findall(r"^avlprof (\w+)", text, flags=re.MULTILINE)
    assert len(commands) > 5
    assert set(commands) <= set(COMMANDS)
    named = re.findall(r"(?:--image |\]\()((?:docs|policies|notebooks)/[\w./-]+)", text)
    assert len(named) > 3
    assert not [name for name in named if not (ROOT / name).exists()]
