"""Owns what the engine needs from outside, as protocols. Rule: the engine names no implementation."""

from collections.abc import Callable, Sequence
from typing import Protocol

from lattice_server.core.messages import SchedulerEvent


class Executor(Protocol):
    """Starts, watches and ends worker processes. Called from the main thread's event loop."""

    name: str

    async def start(self, target: str, join_token: str, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start workers that dial `target`; `post` is told when one is gone for certain."""

    async def stop(self) -> None:
        """End every process this executor started, and only those."""

    def ray_address(self) -> str:
        """Return where Ray's head listens, `host:port`; empty without Ray."""
