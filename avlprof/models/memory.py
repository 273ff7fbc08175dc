"""How much memory is free on a device and on the host, and what an error says that means there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(devices: Iterable[torch.device]) -> int | None:
    """Bytes that are free on the devices of a model together; None where nobody can tell.

    On a GPU what torch holds without using it counts as free, on the host what the container may
    still take.
    """
    known = [_free(device) for device in {torch.device(device) for device in devices}]
    return None if None in known or not known else sum(count for count in known if count is not None)


def model_devices(model: Any) -> set[torch.device]:
    """The devices on which a model's weights lie."""
    return {weight.device for weight in model.parameters() if weight.device.type != "meta"}


def host_bytes() -> int | None:
    """Bytes that are free on the host; None where nobody can tell."""
    counts = [count for count in (_available(), _allowed()) if count is not None]
    return min(counts, default=None)


def _free(device: torch.device) -> int | None:
    if device.type == "cpu":
        return host_bytes()
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _allowed() -> int | None:
    """What a container's limit leaves, files that the system keeps for reading aside."""
    with contextlib.suppress(OSError, ValueError):
        most = int((_CGROUP / "memory.max").read_text())
        held = int((_CGROUP / "memory.current").read_text())
        lines = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = next((int(count) for name, count in lines if name == "inactive_file"), 0)
        return max(most - held + cached, 0)
    return None
