"""The C library's freed memory: returned to the system, or kept with the process. Linux; nothing happens elsewhere."""

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's mallopt parameters (malloc.h)."""
KEPT_BYTES = 1 << 30


def trim() -> None:
    """Return to the system what is kept of freed memory. Thread: any."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Keep large freed blocks up to 1 GiB, for a library that allocates afresh for every array. Thread: any."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
