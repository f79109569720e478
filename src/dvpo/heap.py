"""Memory that is freed stays with the process, for the next step needs as much again.

glibc gives large blocks back to the kernel, and a step that asks for them anew pays a page fault for every 4 kB: up to
12,000 of them and 40 ms, by the order in which blocks happen to be freed (docs/speed.md).
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BLOCK = 2**25
"""Blocks of that many bytes and more still come from the kernel and return to it: a heap with their holes holds more
than it saves."""


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed; whether it does.

    Not where the environment says how memory is to be managed (`MALLOC_...`, `GLIBC_TUNABLES`), nor with another C
    library. Another allocator that is preloaded is not affected.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
