"""Execute every notebook of this folder in a temporary directory; exit with 1 when one fails.

The notebooks are stored with their outputs, so that they can be read where nothing runs. What is stored is
checked as well: it must be there, belong to the cells as they are, be small, and hold no warning and no
path of a machine. `--store` writes it anew; without it the notebooks are not changed. `--check` runs
nothing. `--keep FOLDER` writes the executed copies there. Names choose notebooks.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).parent
LIMIT = 600  # seconds a cell may take on a slow machine
LARGEST = 2_000_000
"""Bytes of a notebook with its outputs."""
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found", "OMP_NUM_THREADS": "1"}
"""Of the kernel: no word about a progress bar that nobody asked for; the models are tiny."""
COLOURS = 256
"""Of a stored picture, at most; with fewer, small things of a picture lose their hue."""
OWN_PATH = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|work|Users|private|var/folders|opt|mnt)/\w")
WARNING = re.compile(r"\b\w*Warning\b|^WARNING|\[WARN", re.MULTILINE)


def execute(path: Path) -> Any:
    """The notebook, run from start to end; `CellExecutionError` shows the cell that failed."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory(prefix="avlprof-notebook-") as work:
        client = NotebookClient(
            notebook,
            timeout=LIMIT,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": work}},
        )
        client.execute(env={**os.environ, **QUIET})
    notebook.metadata = nbformat.from_dict(metadata)
    return notebook


def small(notebook: Any) -> Any:
    """The notebook with its pictures in few colours, which is a third of their size, and marked as stored."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = fewer_colours(data["image/png"])
                data.pop("text/plain", None)
    notebook.metadata["stored"] = sources(notebook)
    return notebook


def fewer_colours(png: str) -> str:
    """A picture in base64, in `COLOURS` colours."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def code_cells(notebook: Any) -> list[Any]:
    """The cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sources(notebook: Any) -> str:
    """A fingerprint of what the cells say."""
    text = json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def troubles(notebook: Any) -> Iterator[str]:
    """What is wrong with a notebook's outputs, in words."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        where = f"code cell {number}"
        if cell.execution_count is None or (cell is code_cells(notebook)[0] and not cell.outputs):
            yield f"{where} has no outputs; run notebooks/run.py --store"
        for output in cell.outputs:
            text = said(output)
            if output.output_type == "error":
                yield f"{where} raised an error"
            if output.get("name") == "stderr" or WARNING.search(text):
                yield f"{where} warns: {' '.join(text.split())[:120]}"
            if found := OWN_PATH.search(text):
                yield f"{where} holds a path of this machine: {text[found.start() :][:60]!r}"


def said(output: Any) -> str:
    """All text of an output; pictures are none."""
    data = output.get("data", {})
    parts = [value for kind, value in data.items() if not kind.startswith("image/")]
    return "\n".join(map(str, [output.get("text", ""), *parts]))


def stored_troubles(path: Path) -> Iterator[str]:
    """What is wrong with the outputs that a notebook is stored with."""
    notebook = nbformat.read(path, as_version=4)
    yield from troubles(notebook)
    if notebook.metadata.get("stored") != sources(notebook):
        yield "its outputs belong to other cells; run notebooks/run.py --store"
    if path.stat().st_size > LARGEST:
        yield f"it takes {path.stat().st_size:,} bytes, {LARGEST:,} at most"


def run(path: Path, store: bool, keep: Path | None) -> list[str]:
    """Execute one notebook, store it if that is asked for; what is wrong with it."""
    begin = time.monotonic()
    try:
        notebook = execute(path)
    except CellExecutionError as error:
        return [f"failed\n{error}"]
    wrong = list(troubles(notebook))
    print(f"{path.name} ran in {time.monotonic() - begin:.0f} s", flush=True)
    if store:
        nbformat.write(small(notebook), path)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, keep / path.name)
    return wrong


def main() -> int:
    """Run and check all notebooks; 1 if something is wrong with one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="notebooks; by default all")
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    parser.add_argument("--check", action="store_true", help="look at what is stored, and run nothing")
    parser.add_argument("--keep", type=Path, help="write the executed copies to this folder")
    options = parser.parse_args()
    failed = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        if options.names and path.name not in options.names and path.stem not in options.names:
            continue
        wrong = [] if options.check else run(path, options.store, options.keep)
        for trouble in dict.fromkeys([*wrong, *stored_troubles(path)]):
            failed = 1
            print(f"{path.name}: {trouble}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
