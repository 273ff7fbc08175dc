"""Execute every notebook of this folder in a temporary directory; exit with 1 when one fails.

The notebooks themselves are not changed, but with `--write`, which stores their outputs in them. `--keep
FOLDER` writes the executed copies there.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).parent
LIMIT = 600  # seconds a cell may take on a slow machine


COLOURS = 255  # of a picture that is stored in a notebook
PNG = "image/png"


def light(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without times, and with pictures of few colours: a third of the bytes."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if PNG in output.get("data", {}):
                output.data[PNG] = few_colours(output.data[PNG])
    return notebook


def few_colours(png: str) -> str:
    """A picture in base64, in a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    stored = io.BytesIO()
    palette = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
    palette.save(stored, "PNG", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def execute(path: Path, keep: Path | None) -> None:
    """Run one notebook from start to end; `CellExecutionError` shows the cell that failed."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="avlprof-notebook-") as work:
        client = NotebookClient(
            notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": work}}
        )
        client.execute()
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        nbformat.write(light(notebook), keep / path.name)


def main() -> int:
    """Run all notebooks; the number of those that failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="write the executed copies to this folder")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    asked = parser.parse_args()
    keep = FOLDER if asked.write else asked.keep
    failed = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        begin = time.monotonic()
        try:
            execute(path, keep)
        except CellExecutionError as error:
            failed = 1
            print(f"{path.name} failed\n{error}", file=sys.stderr)
        else:
            print(f"{path.name} ran in {time.monotonic() - begin:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
