"""Writes a value into a file of the store: a new file gets huge pages, and bytes are copied into pages that exist.

Huge pages take a third less time to be made, to be written again and to be mapped by the tasks that read the value.

Rule: bytes are copied through a mapping only where the file has pages. Where it has none, a full store would end the
process instead of raising an error.
"""

import ctypes
import io
import mmap
import os
from collections.abc import Iterable
from typing import Any

HUGE_PAGE_BYTES = 2 * 1024 * 1024
MIN_HUGE_BYTES = 4 * HUGE_PAGE_BYTES
MIN_MAPPED_BYTES = 1024 * 1024
WINDOW_BYTES = 16 * 1024 * 1024  # Other threads of the process wait while so much is copied.
MADV_COLLAPSE = 25  # Since Linux 6.1. For shared memory only the system's setting `deny` forbids it.
MAP_FIXED = 0x10
PROT_NONE = 0
FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class HugePages:
    """Gives files huge pages until the kernel refuses to: it may not have them, or none may be free."""

    def __init__(self) -> None:
        self.is_refused = False

    def give(self, descriptor: int, size: int) -> None:
        """Give a new, empty file of tmpfs pages for `size` bytes as far as they fill huge ones. Raises OSError."""
        length = size // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if self.is_refused or length < MIN_HUGE_BYTES:
            return
        for offset in range(0, length, HUGE_PAGE_BYTES):
            os.pwrite(descriptor, b"\0", offset)  # The kernel makes no huge page where there is none at all.
        self.is_refused = not _collapsed(descriptor, length)


def fill(file: io.FileIO, parts: Iterable[Any], size: int) -> None:
    """Write a value of `size` bytes in parts to a file, which then has that length. Raises OSError."""
    descriptor, offset = file.fileno(), 0
    ready_bytes = _ready_bytes(descriptor)
    for part in parts:
        view = memoryview(part)
        while view:
            if min(len(view), ready_bytes - offset) >= MIN_MAPPED_BYTES:
                written = _copy(descriptor, view[: ready_bytes - offset], offset)
            else:
                written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    os.ftruncate(descriptor, size)


def _ready_bytes(descriptor: int) -> int:
    """Return how many bytes at the beginning of a file have pages."""
    try:
        return os.lseek(descriptor, 0, os.SEEK_HOLE)
    except OSError:  # It is empty, or the file system does not tell.
        return 0


def _copy(descriptor: int, view: memoryview, offset: int) -> int:
    """Copy bytes into pages that a file has; return how many."""
    lead = offset % mmap.PAGESIZE
    view = view[:WINDOW_BYTES]
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    try:
        window = mmap.mmap(descriptor, lead + len(view), flags=flags, offset=offset - lead)
    except OSError:  # The task has limited its address space.
        return os.pwrite(descriptor, view, offset)
    with window:
        window[lead:] = view
    return len(view)


def _collapsed(descriptor: int, length: int) -> bool:
    """Have the kernel replace the pages of a file by huge ones; return whether it did."""
    # A mapping at an address that is a multiple of their size, in a reserved range.
    reserved = _libc.mmap(None, length + HUGE_PAGE_BYTES, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if reserved == FAILED:
        return False
    try:
        aligned = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
        is_mapped = _libc.mmap(aligned, length, access, flags, descriptor, 0) == aligned
        return bool(is_mapped and _libc.madvise(aligned, length, MADV_COLLAPSE) == 0)
    finally:
        _libc.munmap(reserved, length + HUGE_PAGE_BYTES)
