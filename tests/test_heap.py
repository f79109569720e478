"""Freed memory stays with the process: page faults are counted by the kernel, in a process of its own."""

import json
import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, json, resource
from dvpo.heap import keep_freed_memory

# Of its own accord glibc keeps one such block, but no three of them.
libc, size = ctypes.CDLL(None), 24 * 2**20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, size)  # 6,144 pages
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
plain = faults()
kept = keep_freed_memory()
faults()
print(json.dumps([kept, plain, faults()]))
"""

LARGE_PAGES = """
import ctypes, json, mmap, pathlib
from dvpo.heap import keep_freed_memory

libc, size = ctypes.CDLL(None), 24 * 2**20
libc.malloc.restype = ctypes.c_void_p

def in_large_pages():
    rollup = pathlib.Path("/proc/self/smaps_rollup")
    rows = rollup.read_text().splitlines() if rollup.exists() else []
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("AnonHugePages"))

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

plain, before = in_large_pages(), resident()
kept = keep_freed_memory()
grown = resident() - before
ctypes.memset(libc.malloc(ctypes.c_size_t(size)), 1, size)
ours = in_large_pages() - plain
asked = mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # what the kernel gives to whoever asks
asked.madvise(mmap.MADV_HUGEPAGE)
ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(asked)), 1, 2 * size)
print(json.dumps([kept, grown, ours, in_large_pages() - plain - ours]))
"""


def run(script: str = FAULTS, **environment: str) -> list[int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True, check=True
    )
    found: list[int] = json.loads(done.stdout)
    return found


def test_what_is_used_next_lies_in_large_pages_and_room_for_it_costs_nothing():
    kept, grown, large, given = run(LARGE_PAGES)
    assert grown < 4096  # pages of 4 kB: the room is addresses, not memory
    if kept and given > 40 * 2**20:  # a kernel may have none, or none to give
        assert large > 20 * 2**20


def test_a_block_that_was_freed_is_used_again():
    kept, plain, after = run()
    assert kept == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert plain > 5_000
        assert after < 100


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_memory_is_left_alone(name: str):
    kept, _, after = run(**{name: "4" if name.startswith("MALLOC") else "glibc.malloc.arena_max=4"})
    assert not kept
    assert after > 5_000
