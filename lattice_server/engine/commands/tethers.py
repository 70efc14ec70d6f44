"""Owns which calls hold runs that are cancelled when their caller is disconnected, and the timers of their grace times.

Rule: the machine of a run decides; this class carries calls and timers to it.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lattice_server.core.run.tether import Tether
from lattice_server.engine.commands.driver import RunDriver
from lattice_server.engine.runs.entry import RunEntry


class Tethers:
    """The runs that are tied to their callers; lives on the main thread."""

    def __init__(self, driver: RunDriver) -> None:
        self._driver = driver

    def begin(self, entry: RunEntry, grace_s: float) -> None:
        """Have a run wait for a call that holds it, for the grace time."""
        entry.tether = Tether(entry.run, grace_s, time.monotonic())
        self._set_timer(entry)

    @contextmanager
    def held(self, entry: RunEntry, grace_s: float | None) -> Iterator[None]:
        """Have a call hold a run while the block runs; without a grace time nothing changes."""
        if grace_s is None:
            yield
            return
        if entry.tether is None:
            entry.tether = Tether(entry.run, grace_s, time.monotonic())
        entry.tether.hold(grace_s)
        try:
            yield
        finally:
            entry.tether.leave(time.monotonic())
            self._set_timer(entry)

    def _set_timer(self, entry: RunEntry) -> None:
        """Have the machine's tick called at its next deadline."""
        if entry.tether_timer is not None:
            entry.tether_timer.cancel()
            entry.tether_timer = None
        deadline = None if entry.tether is None else entry.tether.next_deadline()
        if deadline is not None:
            delay_s = max(0.0, deadline - time.monotonic())
            entry.tether_timer = asyncio.get_running_loop().call_later(delay_s, self._tick, entry)

    def _tick(self, entry: RunEntry) -> None:
        entry.tether_timer = None
        if entry.tether is not None:
            with self._driver.change(entry) as perform:
                perform(entry.tether.tick(time.monotonic()))
            self._set_timer(entry)
