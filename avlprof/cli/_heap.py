"""What a command asks of glibc: that freed memory stays for the next tensors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Final

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST: Final = 32 << 20  # glibc's own limit of the second
_KEPT: Final = 512 << 20
_ENVIRONMENT: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Have up to 512 MiB that tensors of up to 32 MiB free stay with the process.

    By default glibc hands such memory back and asks for it anew, page by page: a twentieth of the time of
    a study of a small model on a CPU. Elsewhere, and where the environment sets such limits, nothing happens.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _ENVIRONMENT):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        malloc = ctypes.CDLL("libc.so.6").mallopt
        malloc(_MMAP, _LARGEST)
        malloc(_TRIM, _KEPT)
