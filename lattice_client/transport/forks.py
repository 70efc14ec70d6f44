"""Owns the state of gRPC in a forked process. Rule: a forked child makes no call and frees no object of gRPC.

gRPC's threads do not exist in a child, and its locks may be held: a call would crash or block for ever. To free a
channel would wait for those threads, and to close its event loop would change an epoll instance that the parent uses.
"""

import ctypes
import os
import weakref
from typing import Any

from lattice_client import errors

_shared: "weakref.WeakSet[Any]" = weakref.WeakSet()


class _Process:
    """Whether gRPC was used in this process, and whether the process was forked after that."""

    uses_grpc = False
    is_broken = False


def use(thing: Any) -> None:
    """Register an object of gRPC, or its event loop, before its use. Raises ForkError in a forked process."""
    check_process()
    _Process.uses_grpc = True
    _shared.add(thing)


def check_process() -> None:
    """Raise ForkError in a process that was forked after gRPC had been used."""
    if _Process.is_broken:
        raise errors.ForkError(
            "this process was forked from one in which a Lattice client had connected, and gRPC does not work in such "
            "a process: use the start method 'spawn' or 'forkserver' of multiprocessing, or connect only after the fork"
        )


def is_broken() -> bool:
    """Whether this process was forked after gRPC had been used."""
    return _Process.is_broken


def _after_fork() -> None:
    _Process.is_broken = _Process.uses_grpc
    for thing in _shared:
        # An additional reference keeps the object alive, also when the interpreter exits.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)
