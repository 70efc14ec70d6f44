"""Owns moving the memory of this process to huge pages.

A run of one small task goes through hundreds of functions once, so most of its time is spent waiting for memory. With
pages of 4 KiB the processor also has to look up where each page is, which on a virtual machine takes several more
accesses to memory. Pages of 2 MiB need few look-ups: see decision 76.

Rule: it never fails. Memory that Linux cannot move stays where it is; other systems have nothing to do.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
HUGE_BYTES = 2 * 1024 * 1024
PAGES = HUGE_BYTES // PAGE_BYTES
# A huge page takes the memory of all its pages, so at least half of them have to be in use.
LEAST_PAGES = PAGES // 2
MADV_COLLAPSE = 25  # Since Linux 6.1.
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> int:
    """Move the private memory that is in use now to huge pages; return the number of bytes that are on such pages.

    It takes about 1 ms for each MiB that is moved. Memory that is used later is not moved.
    """
    if sys.platform != "linux" or not _is_allowed():
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    moved = 0
    for start, end in _private_memory():
        for block in range(-(-start // HUGE_BYTES) * HUGE_BYTES, end - HUGE_BYTES + 1, HUGE_BYTES):
            used = ctypes.create_string_buffer(PAGES)
            if libc.mincore(block, HUGE_BYTES, used) == 0 and used.raw.count(b"\x01") >= LEAST_PAGES:
                moved += HUGE_BYTES * (libc.madvise(block, HUGE_BYTES, MADV_COLLAPSE) == 0)
    return moved


def _is_allowed() -> bool:
    """Whether the administrator of the machine allows huge pages."""
    try:
        return "[never]" not in SETTING.read_text()
    except OSError:
        return False


def _private_memory() -> Iterator[tuple[int, int]]:
    """Yield the ranges of memory that may be written, and belong to no file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0":
            start, _, end = addresses.partition("-")
            yield int(start, 16), int(end, 16)
