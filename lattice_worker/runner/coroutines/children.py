"""Child processes of async invocations, which share a process: their attempts, and their output.

Rule: a child belongs to the attempt whose code started it, and so do its descendants. When their parent dies, this
process adopts them. They are recognised by their process ids, sessions and groups, by a variable of their environment,
and by the pipe they inherited as their standard output. Children that none of these identifies end when no attempt is
left that they could belong to.
"""

import contextlib
import os
import select
import signal
import threading
import weakref
from pathlib import Path

from lattice_worker.runner.coroutines.attempt import Attempt
from lattice_worker.runner.surroundings.process_tree import children_of

MARK = "LATTICE_INVOCATION"
READ_BYTES = 1 << 16
STREAMS = {1: "stdout", 2: "stderr"}


class Family:
    """The children of one attempt, and the pipes that they inherit as their standard streams."""

    def __init__(self, attempt: Attempt, listener: "Listener") -> None:
        self.pids: set[int] = set()
        self.mark = f"{os.getpid()}:{attempt.number}"
        self._attempt = weakref.ref(attempt)
        self._listener = listener
        self._pipes: dict[int, tuple[int, int]] = {}
        self._links: set[str] = set()

    def streams(self) -> dict[int, int]:
        """Return what children are to have for the standard streams that are still the process's own; fewer when
        descriptors are short."""
        with contextlib.suppress(OSError):
            for descriptor in STREAMS.keys() - self._pipes.keys():
                read, write = os.pipe()
                os.set_blocking(read, False)
                self._pipes[descriptor] = read, write
                self._links.add(f"pipe:[{os.fstat(write).st_ino}]")
                self._listener.add(read, self, descriptor)
        is_own = self._listener.is_own
        return {descriptor: write for descriptor, (_, write) in self._pipes.items() if is_own(descriptor)}

    def read(self) -> None:
        """Take all that children have written."""
        for descriptor, (read, _) in list(self._pipes.items()):
            self._listener.read(read, self, descriptor)

    def write(self, descriptor: int, data: bytes) -> None:
        """Log output of a child for the attempt."""
        if (attempt := self._attempt()) is not None:
            attempt.write(STREAMS[descriptor], data.decode(errors="replace"))

    def kill(self) -> list[int]:
        """Kill the living members; return them, each before its descendants."""
        found: list[int] = []
        for pid in children_of(os.getpid()):
            if not _is_of_another(pid, self) and (pid in self.pids or self._is_member(pid)):
                found += _tree(pid)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def _is_member(self, pid: int) -> bool:
        """Whether an adopted process is one of the family."""
        with contextlib.suppress(OSError):  # It ended meanwhile.
            if os.getsid(pid) in self.pids or os.getpgid(pid) in self.pids:
                return True
            if f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return True
            folder = f"/proc/{pid}/fd"
            return any(os.readlink(f"{folder}/{name}") in self._links for name in os.listdir(folder))
        return False

    def close(self) -> None:
        """Read all that is in the pipes, and close them."""
        self.read()
        pipes, self._pipes = self._pipes, {}
        for read, write in pipes.values():
            self._listener.remove(read)
            os.close(write)


class Listener:
    """Reads the pipes of all families, in a thread: a coroutine may wait for a child that waits to be read."""

    def __init__(self) -> None:
        self._own = {descriptor: os.fstat(descriptor).st_ino for descriptor in STREAMS}
        self._epoll = select.epoll()
        self._lock = threading.RLock()  # A signal handler may start a child too.
        self._families: dict[int, tuple[Family, int]] = {}
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def is_own(self, descriptor: int) -> bool:
        """Whether a standard stream still is the original one of the process."""
        try:
            return os.fstat(descriptor).st_ino == self._own[descriptor]
        except OSError:
            return False

    def add(self, read: int, family: Family, descriptor: int) -> None:
        """Listen to a pipe."""
        with self._lock:
            self._families[read] = family, descriptor
        self._epoll.register(read, select.EPOLLIN)
        if self._thread.ident is None:
            self._thread.start()

    def remove(self, read: int) -> None:
        """Close a pipe."""
        with self._lock:
            del self._families[read]
            self._epoll.unregister(read)
            os.close(read)

    def read(self, read: int, family: Family, descriptor: int) -> None:
        """Take all that is in a pipe, in the order in which it was written."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while self._families.get(read) == (family, descriptor) and (data := os.read(read, READ_BYTES)):
                family.write(descriptor, data)

    def _listen(self) -> None:
        while True:
            for read, _ in self._epoll.poll():
                if (found := self._families.get(read)) is not None:
                    self.read(read, *found)


_families: dict[Attempt, Family] = {}


def family_of(attempt: Attempt, listener: Listener) -> Family:
    """Return the family of an attempt, which may have no members yet."""
    family = _families.get(attempt)
    if family is None:
        family = _families[attempt] = Family(attempt, listener)
    return family


def note(family: Family, pid: int) -> None:
    """Note a new child; the id may have been that of another one before."""
    for other in list(_families.values()):
        other.pids.discard(pid)
    family.pids.add(pid)


def _is_of_another(pid: int, family: Family) -> bool:
    return any(pid in other.pids for other in list(_families.values()) if other is not family)


def end(attempt: Attempt) -> None:
    """Kill the children of an attempt that is over, and read their output."""
    if (family := _families.get(attempt)) is None:
        return
    killed = family.kill()
    family.close()
    if killed:
        # In a thread: a process does not always end at once, and other attempts must not wait for it.
        threading.Thread(target=_reap, args=(family, killed), daemon=True).start()
    del _families[attempt]


def _reap(family: Family, killed: list[int]) -> None:
    """Wait for killed processes, and kill processes that they started meanwhile."""
    while killed:
        for pid in killed:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        killed = family.kill()


def _tree(pid: int) -> list[int]:
    return [pid, *(found for child in children_of(pid) for found in _tree(child))]
