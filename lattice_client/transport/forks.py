"""Owns what becomes of a client in a forked process. Rule: the child changes nothing of its parent.

Neither the threads nor the locks of gRPC survive a fork: each call in the child would crash or wait for ever, so there
are none. The child also frees none of gRPC's objects, nor the event loop that drives them: to free a channel waits for
threads that are not there, and the loop's descriptors lie in an epoll instance that the parent uses.
"""

import ctypes
import os
import weakref
from typing import Any

from lattice_client import errors

_shared: "weakref.WeakSet[Any]" = weakref.WeakSet()


class _Process:
    """Whether gRPC was used in this process, or in one it was forked from."""

    uses_grpc = False
    is_broken = False


def use(thing: Any) -> None:
    """Note an object of gRPC, or one that drives it, before it is used. Raises ForkError where gRPC cannot work."""
    check_process()
    _Process.uses_grpc = True
    _shared.add(thing)


def check_process() -> None:
    """Raise ForkError where gRPC cannot work."""
    if _Process.is_broken:
        raise errors.ForkError(
            "this process was forked from one in which a Lattice client had connected, and gRPC does not work in such "
            "a process: use the start method 'spawn' or 'forkserver' of multiprocessing, or connect only after the fork"
        )


def is_broken() -> bool:
    """Whether gRPC cannot work in this process."""
    return _Process.is_broken


def _after_fork() -> None:
    _Process.is_broken = _Process.uses_grpc
    for thing in _shared:
        # A reference that nothing gives back, not even the end of the interpreter.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_after_fork)
