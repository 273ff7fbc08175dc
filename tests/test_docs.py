"""The documentation: its Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import json
import re

import matplotlib.pyplot as plt
import pytest
import torch

from tests.helpers import ROOT, thinned

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_what_their_cells_gave(path):
    """As `notebooks/run.py --write` stores it: figures of few bytes, and no warning of any library."""
    code = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert path.stat().st_size < 2e6


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
