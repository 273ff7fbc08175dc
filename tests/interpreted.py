"""Kernels of Triton in its interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

RUNNABLE = find_spec("triton") is not None and (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
)
"""Whether kernels run in this process."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

runs_here = pytest.mark.skipif(
    not RUNNABLE, reason="needs a CUDA device, or TRITON_INTERPRET=1 from the start"
)


def runs_elsewhere(test):
    """Marks a test that starts `passes`."""
    test = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")(test)
    return pytest.mark.skipif(RUNNABLE, reason="the kernels run in this process")(test)


def passes(file, count, *select):
    """Run the tests of a file that `select` names in a process with the interpreter: `count` must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", file, *select],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} passed" in done.stdout


class Launched:
    """A kernel that notes its launches in a list, and does not run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel)
        return lambda *arguments, **constants: None
