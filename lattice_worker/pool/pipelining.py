"""Pipelining: a runner is sent invocations before the one it runs has ended, so that it never waits for the agent.

A pipelined invocation is one frame and one claim. A claim is a number in a pipe that both the runner and the agent can
read; the kernel gives each number to one reader. The runner reads the claim before it runs the invocation. The agent
reads claims to withdraw invocations. It cannot choose among them: it reads all claims that are left, and sends the
other invocations again.

A runner may run a pipelined invocation while the agent still converts the answer before it. Frames of such an
invocation are buffered until the agent begins it.

Rule: an invocation runs only if the runner read its claim; one that the agent withdrew is never begun.
"""

import os
import struct
from itertools import count

from lattice_worker.pool.invocation import Frame, Invocation

MAX_PIPELINED = 64
CLAIM = struct.Struct("<Q")


class Pipeline:
    """The pipelined invocations of one runner. `claims` is the read end of the claim pipe."""

    def __init__(self) -> None:
        self.claims, self._write_end = os.pipe()
        for descriptor in (self.claims, self._write_end):
            os.set_blocking(descriptor, False)
        self._numbers = count(1)
        self._queued: dict[str, Invocation] = {}
        self._early: dict[str, list[Frame]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._queued

    def __len__(self) -> int:
        return len(self._queued)

    def get(self, name: str) -> Invocation | None:
        """Return a pipelined invocation that the agent has not begun."""
        return self._queued.get(name)

    def invocations(self) -> list[Invocation]:
        """Return all pipelined invocations that the agent has not begun."""
        return list(self._queued.values())

    def add(self, invocation: Invocation) -> None:
        """Number an invocation and write its claim. Its frame has to be sent next."""
        invocation.claim = invocation.header["claim"] = next(self._numbers)
        self._queued[invocation.name] = invocation
        os.write(self._write_end, CLAIM.pack(invocation.claim))

    def begin(self, name: str) -> tuple[Invocation, list[Frame]]:
        """Remove an invocation that is next in its slot; return it and the frames that came of it already."""
        return self._queued.pop(name), self._early.pop(name, [])

    def buffer(self, name: str, frame: Frame) -> None:
        """Keep a frame of an invocation that the agent has not begun."""
        self._early.setdefault(name, []).append(frame)

    def withdraw(self) -> frozenset[int]:
        """Withdraw all invocations that the runner has not claimed; return their claims."""
        try:
            data = os.read(self.claims, CLAIM.size * MAX_PIPELINED)
        except BlockingIOError:
            return frozenset()
        withdrawn = frozenset(claim for (claim,) in CLAIM.iter_unpack(data))
        self._queued = {name: found for name, found in self._queued.items() if found.claim not in withdrawn}
        return withdrawn

    def clear(self) -> None:
        """Forget all invocations: the runner begins none of them any more."""
        self._queued.clear()

    def close(self) -> None:
        """Close the claim pipe."""
        os.close(self.claims)
        os.close(self._write_end)
