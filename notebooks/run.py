"""Execute every notebook of this folder in a temporary directory; exit with 1 when one fails.

The notebooks themselves are not changed. `--keep FOLDER` writes the executed copies there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
LIMIT = 600  # seconds a cell may take on a slow machine


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
        nbformat.write(notebook, keep / path.name)


def main() -> int:
    """Run all notebooks; the number of those that failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="write the executed copies to this folder")
    keep = parser.parse_args().keep
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
