"""The notebooks as they are stored: with the outputs of their own cells, small, and clean."""

from __future__ import annotations

import importlib.util

import nbformat
import pytest

from tests.helpers import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def runner():
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = runner()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_there_and_clean(path):
    assert list(RUN.stored_troubles(path)) == []


def test_the_first_notebook_holds_the_explorer_live():
    notebook = nbformat.read(FOLDER / "explore_attention.ipynb", as_version=4)
    pages = [out.data["text/html"] for cell in RUN.code_cells(notebook) for out in cell.outputs
             if "iframe" in out.get("data", {}).get("text/html", "")]  # fmt: skip
    assert len(pages) == 1
    assert 'sandbox="allow-scripts"' in pages[0] and "avlprof.explore/1" in pages[0]


def notebook_of(outputs, count=1):
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=count, outputs=outputs)
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (("stream", {"name": "stderr", "text": "hm"}), "warns: hm"),
        (("stream", {"text": "x.py:3: UserWarning: old"}), "warns: x.py:3"),
        (
            ("stream", {"text": "wrote /tmp/avlprof-x/run"}),
            "holds a path of this machine: '/tmp/avlprof-x/run'",
        ),
        (("display_data", {"data": {"text/html": "<a href='/home/me'>"}}), "/home/me"),
        (("error", {"ename": "E", "evalue": "", "traceback": []}), "raised an error"),
    ],
)
def test_what_is_not_clean_is_found(output, said):
    kind, fields = output
    (trouble,) = set(RUN.troubles(notebook_of([nbformat.v4.new_output(kind, **fields)])))
    assert said in trouble


def test_plain_outputs_pass_and_missing_ones_do_not(tmp_path):
    fine = nbformat.v4.new_output("stream", text="see https://x.org/tmp/a and a/tmp/b, 3/4")
    assert list(RUN.troubles(notebook_of([fine]))) == []
    assert "has no outputs" in next(RUN.troubles(notebook_of([])))
    assert "has no outputs" in next(RUN.troubles(notebook_of([fine], None)))
    path, notebook = tmp_path / "a.ipynb", RUN.small(notebook_of([fine]))
    nbformat.write(notebook, path)
    assert list(RUN.stored_troubles(path)) == []
    notebook.cells[0].source = "1 + 2"
    nbformat.write(notebook, path)
    assert "belong to other cells" in next(RUN.stored_troubles(path))


def test_pictures_keep_what_they_show_in_fewer_colours():
    import base64
    import io

    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:90, 0:120]
    picture = Image.fromarray(np.dstack([2 * x, 2 * y, (x + y)]).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    few = RUN.fewer_colours(base64.b64encode(buffer.getvalue()).decode())
    shown = Image.open(io.BytesIO(base64.b64decode(few))).convert("RGB")
    assert shown.size == picture.size and len(shown.getcolors(999)) <= RUN.COLOURS
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(picture)).mean() < 8
