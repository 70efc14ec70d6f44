"""Owns how signals reach the machine of a run, and the timer of the attempts that wait for them.

Rule: the machine decides; this class carries requests and timers to it.
"""

import asyncio
import time
from collections.abc import Sequence

from lattice_server.core.messages import TaskAwaits
from lattice_server.core.model import Payload
from lattice_server.core.run.signals import SignalEffect
from lattice_server.engine.commands.driver import RunDriver
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.log import EVENT_BYTES


class RunSignals:
    """The signals of all runs; lives on the main thread."""

    def __init__(self, driver: RunDriver, admission: Admission) -> None:
        self._driver = driver
        self._admission = admission

    def send(self, entry: RunEntry, name: str, value: Payload, request_id: str) -> int:
        """Send a signal to a run; return which value of its name it is. Raises as `Signals.send`, and STORE_FULL."""
        with self._driver.change(entry) as perform:
            self._admission.check_memory(EVENT_BYTES + value.kept_bytes, entry.run.tenant)
            fact, effects = entry.run.signals.send(name, value, request_id)
            perform(effects)
        self._set_timer(entry)
        return fact.index

    def wait(self, entry: RunEntry, event: TaskAwaits, now: float) -> Sequence[SignalEffect]:
        """Return the effects of a wait of an attempt."""
        effects = entry.run.signals.wait(event, now)
        self._set_timer(entry)
        return effects

    def _set_timer(self, entry: RunEntry) -> None:
        """Have the machine's tick called at its next deadline."""
        if entry.signal_timer is not None:
            entry.signal_timer.cancel()
            entry.signal_timer = None
        deadline = entry.run.signals.next_deadline()
        if deadline is not None and not entry.run.is_terminal:
            delay_s = max(0.0, deadline - time.monotonic())
            entry.signal_timer = asyncio.get_running_loop().call_later(delay_s, self._tick, entry)

    def _tick(self, entry: RunEntry) -> None:
        entry.signal_timer = None
        with self._driver.change(entry) as perform:
            perform(entry.run.signals.tick(time.monotonic()))
        self._set_timer(entry)
