"""Freed memory stays with a command."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from avlprof.cli._heap import keep_freed_memory

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
LIMITS = ("MALLOC_", "GLIBC_TUNABLES")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_tensors_take_the_memory_that_others_freed():
    """Pages that are not handed back are not asked for anew."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LIMITS)}
    said = subprocess.run(
        [sys.executable, "-c", ASKED_ANEW], env=environment, capture_output=True, text=True, check=True
    )
    assert int(said.stdout) < 15 * (36 << 20) // os.sysconf("SC_PAGE_SIZE") / 10


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_limits_of_the_environment_are_left_alone(name, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail("malloc was asked"))
    monkeypatch.setenv(name, "1")
    keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LIMITS):
            monkeypatch.delenv(name)
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: asked.append(path) or object())
    keep_freed_memory()
    assert asked == (["libc.so.6"] if sys.platform == "linux" else [])
