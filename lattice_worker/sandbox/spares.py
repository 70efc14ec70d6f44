"""Sealed processes that wait for an invocation, by policy.

Rule: each is handed out once. A policy has spares from its first use until it has not been used for `IDLE_S`, or until
more than `MAX_POLICIES` others were used after it.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from lattice_worker import background
from lattice_worker.sandbox.policy import Policy
from lattice_worker.sandbox.supervisor import SandboxError

IDLE_S = 60.0
MAX_POLICIES = 8


class Sealed(Protocol):
    """A process that is sealed."""

    @property
    def is_fit(self) -> bool:
        """Whether it can take an invocation."""

    def kill(self) -> None:
        """End it."""


P = TypeVar("P", bound=Sealed)


class Spares(Generic[P]):
    """The waiting processes. `start` makes one; `wanted` is how many wait for the next attempts of each policy."""

    def __init__(self, start: Callable[[Policy], Awaitable[P]], wanted: int) -> None:
        self._start = start
        self._wanted = wanted
        self._waiting: dict[Policy, list[P]] = {}
        self._timers: dict[Policy, asyncio.TimerHandle] = {}
        self._refilling: dict[Policy, asyncio.Task[None]] = {}
        self._is_closed = False

    async def take(self, policy: Policy) -> P:
        """Return a process that was never used. Raises OSError and SandboxError."""
        if (found := self.take_waiting(policy)) is not None:
            return found
        try:
            return await self._start(policy)
        finally:
            # Not before: two that start at once take longer than one.
            self._fill(policy)

    def take_waiting(self, policy: Policy) -> P | None:
        """Return a process that waits, or None."""
        self._postpone(policy)
        waiting = self._waiting.get(policy, [])
        while waiting:
            if (found := waiting.pop()).is_fit:
                self._fill(policy)
                return found
        return None

    def add(self, policy: Policy, process: P) -> None:
        """Have one more process wait."""
        self._waiting.setdefault(policy, []).append(process)
        self._postpone(policy)

    def drop(self, is_dropped: Callable[[Policy], bool]) -> None:
        """End the processes of some policies."""
        for policy in [policy for policy in {*self._waiting, *self._refilling} if is_dropped(policy)]:
            self._end(policy)

    def close(self) -> None:
        """End all processes, and start no more."""
        self._is_closed = True
        self.drop(lambda _: True)

    def _fill(self, policy: Policy) -> None:
        if policy not in self._refilling and not self._is_closed:
            refilling = background.start(self._refill(policy), background.only_log)
            self._refilling[policy] = refilling
            refilling.add_done_callback(lambda _: self._refilling.pop(policy, None))

    async def _refill(self, policy: Policy) -> None:
        # Where none can be made now, the attempt that needs one says so.
        with contextlib.suppress(OSError, SandboxError):
            while len(self._waiting.setdefault(policy, [])) < self._wanted:
                self._waiting[policy].append(await self._start(policy))

    def _postpone(self, policy: Policy) -> None:
        if (timer := self._timers.pop(policy, None)) is not None:
            timer.cancel()
        self._timers[policy] = asyncio.get_running_loop().call_later(IDLE_S, self._end, policy)
        if len(self._timers) > MAX_POLICIES:
            self._end(next(iter(self._timers)))

    def _end(self, policy: Policy) -> None:
        if (timer := self._timers.pop(policy, None)) is not None:
            timer.cancel()
        if (refilling := self._refilling.get(policy)) is not None:
            refilling.cancel()
        for process in self._waiting.pop(policy, []):
            process.kill()
