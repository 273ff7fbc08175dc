"""Freed memory stays with a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASKED_ANEW = """
import resource
from avlprof.cli._heap import keep_freed_memory
import torch

keep_freed_memory()
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 << 20)  # 8 MiB
    torch.ones(7 << 20)  # 28 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[5:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(("limit", "stays"), [(None, True), ("131072", False)])
def test_tensors_take_the_memory_that_others_freed(limit, stays):
    """Pages that are not handed back are not asked for anew; an environment that says otherwise is obeyed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {} if limit is None else {"MALLOC_MMAP_THRESHOLD_": limit}
    said = subprocess.run(
        [sys.executable, "-c", ASKED_ANEW], env=environment, capture_output=True, text=True, check=True
    )
    pages = 15 * (36 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert (int(said.stdout) < pages / 10) == stays
