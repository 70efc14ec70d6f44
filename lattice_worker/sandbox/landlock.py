"""Landlock: the kernel refuses this process, and all it starts, every file that no rule allows.

Rule: one ruleset, so that files can be renamed between all folders that may be written. Where the kernel has them, the
scopes also refuse signals and abstract Unix sockets to processes outside.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from lattice_worker.sandbox import libc

CREATE_VERSION = 1
RULE_PATH_BENEATH = 1
MIN_ABI = 3  # Below, a file that may only be read could be truncated.
SCOPES_ABI = 6

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ = EXECUTE | READ_FILE | READ_DIR
DEVICE = READ_FILE | WRITE_FILE | IOCTL_DEV
SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1, 2


def abi() -> int:
    """Return the version of Landlock that this kernel has; 0 for none that is enough."""
    try:
        found = libc.syscall(libc.LANDLOCK_CREATE_RULESET, None, 0, CREATE_VERSION)
    except OSError:
        return 0
    return found if found >= MIN_ABI else 0


def handled(version: int) -> int:
    """Return all accesses to files that a version of Landlock can refuse."""
    return (1 << (16 if version >= 5 else 15)) - 1


def restrict(read: Iterable[str], write: Iterable[str], devices: Iterable[str], version: int) -> None:
    """Allow this process to read `read`, to do anything but make device files in `write`, and to use `devices`; to
    touch no other file. Paths that do not exist are left out. Needs no_new_privs."""
    every = handled(version)
    scopes = SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS if version >= SCOPES_ABI else 0
    sizes = 24 if version >= SCOPES_ABI else 16 if version >= 4 else 8
    attributes = struct.pack("<3Q", every, 0, scopes)[:sizes]
    ruleset = libc.syscall(libc.LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for paths, allowed in ((read, READ), (write, every & ~(MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)), (devices, DEVICE)):
            for path in paths:
                _allow(ruleset, path, allowed & every)
        libc.syscall(libc.LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, allowed: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            allowed &= OF_FILES
        rule = ctypes.create_string_buffer(struct.pack("<Qi", allowed, descriptor))
        libc.syscall(libc.LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)
