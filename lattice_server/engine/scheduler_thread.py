"""Owns the scheduler's thread. Rule: it sleeps on its inbox until an event or its machine's next deadline."""

import logging
import math
import threading
import time
from collections.abc import Callable

from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.engine.bus import MessageBus

log = logging.getLogger(__name__)

# How long to wait after each tick in a row that raised. A single failure is no reason to stop: the next tick often
# succeeds.
PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


class SchedulerThread:
    """Drives a scheduler machine on a thread of its own; no other thread touches the machine while it runs.

    A machine that raises at every tick places nothing, and its effects are lost: runs would wait for ever on a server
    that looks healthy. So after some tries the thread calls `on_failure` and ends. The server then stops, its callers
    get an error, and its supervisor can start another one.
    """

    def __init__(self, machine: Scheduler, bus: MessageBus, on_failure: Callable[[], object]) -> None:
        self.machine = machine
        # Takes the number of events of each pass, and its duration in seconds; to be set before the start.
        self.on_pass: Callable[[int, float], None] | None = None
        self._bus = bus
        self._on_failure = on_failure
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lattice-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread finish its inbox and wait for it."""
        self._is_stopping.set()
        self._bus.close()
        self._thread.join()

    def _run(self) -> None:
        failed = 0
        while failed <= len(PAUSES_S):
            try:
                if not self._step(is_again=failed > 0):
                    return
                failed = 0
            except Exception:
                failed += 1
                log.exception("the scheduler could not place queued tasks, %d times in a row", failed)
                if failed <= len(PAUSES_S):
                    # Not on the inbox: each event would cause another try, and another line in the log.
                    self._is_stopping.wait(PAUSES_S[failed - 1])
        log.critical("the scheduler has failed %d times in a row and gives up", failed)
        self._on_failure()

    def _step(self, *, is_again: bool) -> bool:
        """Wait for events unless the last tick is repeated, take them and tick; return False after the bus closed."""
        deadline = -math.inf if is_again else self.machine.next_deadline()
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        events = self._bus.next_events(timeout_s)
        if events is None:
            return False
        now = time.monotonic()
        for event in events:
            try:
                self.machine.take(event, now)
            except Exception:
                # An event that breaks an invariant must not end scheduling for all runs.
                log.exception("the scheduler could not take %s and skips it", type(event).__name__)
        self._bus.publish(self.machine.tick(now))
        if self.on_pass is not None:
            self.on_pass(len(events), time.monotonic() - now)
        return True
