"""Peak memory of one piece of work: CUDA's own counter, or the process's high-water mark on Linux."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_above(device: torch.device, work: Callable[[], None]) -> int | None:
    """Run `work` and return the bytes by which memory rose above where it stood before.

    On CUDA these are bytes that torch allocated. On CPU they are pages of the process, counted
    by the kernel, after freed ones were given back to it; what an allocation never touched is not
    in them, and numbers under a few MiB are noise. None where Linux's counters are missing.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_allocated(device) - before, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # the high-water mark starts anew: man 5 proc
        before = _kilobytes("VmRSS")
    except (OSError, TypeError):
        work()
        return None
    work()
    return max(_kilobytes("VmHWM") - before, 0) * 1024


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", _STATUS.read_text())
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1])
