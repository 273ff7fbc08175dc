"""Peak memory of one piece of work, as torch's own allocators count it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_above(device: torch.device, work: Callable[[], object]) -> int | None:
    """Run `work` and return the bytes by which tensors on the device rose above where they stood.

    On CUDA it is the allocator's own high-water mark. On CPU every allocation is recorded by
    torch's profiler, which slows the work down but misses nothing; pages of the process would tell
    more of the C library's habits than of the work. None on other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_allocated(device) - before, 0)
    if device.type != "cpu":
        work()
        return None
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent():
        recorder.start()
    try:
        work()
    finally:
        with _silent():
            recorder.stop()
    results = getattr(recorder.profiler, "kineto_results", None)
    events = [event for event in results.events() if event.name() == "[memory]"] if results else []
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes lines of its own to the process's stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        line = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(line[1]) * 1024 if line else None
