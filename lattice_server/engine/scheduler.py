"""Owns the scheduler's thread. Rule: it sleeps on its inbox until an event or its machine's next deadline."""

import logging
import threading
import time

from lattice_server.core.dispatch import Dispatch
from lattice_server.engine.bus import MessageBus

log = logging.getLogger(__name__)


class Scheduler:
    """Drives a `Dispatch` on a thread of its own; nobody else touches the machine while it runs."""

    def __init__(self, machine: Dispatch, bus: MessageBus) -> None:
        self.machine = machine
        self._bus = bus
        self._thread = threading.Thread(target=self._run, name="lattice-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread finish its inbox and wait for it."""
        self._bus.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            deadline = self.machine.next_deadline()
            timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = self._bus.next_events(timeout_s)
            if events is None:
                return
            now = time.monotonic()
            for event in events:
                try:
                    self.machine.take(event, now)
                except Exception:
                    # The last resort: an event that breaks an invariant must not end scheduling for everybody.
                    log.exception("the scheduler could not take %s; it goes on", type(event).__name__)
            try:
                self._bus.publish(self.machine.tick(now))
            except Exception:
                log.exception("the scheduler could not place what waits; it goes on")
