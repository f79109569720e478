"""Memory that is freed stays with the process, for the next step needs as much again, and comes in large pages.

glibc gives large blocks back to the kernel, and a step that asks for them anew pays a page fault for every 4 kB: up to
12,000 of them and 40 ms, by the order in which blocks happen to be freed. To find what is kept among so many pages
takes the processor time, too, which pages of 2 MB save (docs/speed.md).
"""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MADV_COLLAPSE = 25
LARGEST_BLOCK = 2**25
"""Blocks of that many bytes and more still come from the kernel and return to it: a heap with their holes holds more
than it saves."""
ROOM, GLIBC_TOP_PAD = 2**30, 2**17
"""Bytes of addresses that the heap has ahead, no memory until they are used; what glibc has ahead of its own accord."""


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed, and Linux for large pages; whether glibc does.

    Not where the environment says how memory is to be managed (`MALLOC_...`, `GLIBC_TUNABLES`), nor with another C
    library. Another allocator that is preloaded is not affected.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    kept = bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    if kept:
        with contextlib.suppress(OSError, AttributeError):  # no /proc to read, or no sbrk in this library
            _ask_for_large_pages(libc)
    return kept


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """In the heap as it is and in room made behind it; a kernel that has none, or none to give, leaves it as it was."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    heaps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    libc.mallopt(M_TOP_PAD, ROOM)
    block = libc.malloc(LARGEST_BLOCK // 2)
    libc.mallopt(M_TOP_PAD, GLIBC_TOP_PAD)
    if heaps and block:
        first, end = int(heaps[0].partition("-")[0], 16), libc.sbrk(0)
        libc.madvise(first, end - first, mmap.MADV_HUGEPAGE)
        libc.madvise(first, end - first, MADV_COLLAPSE)  # what is in use already; from Linux 6.1 on
    libc.free(block)
