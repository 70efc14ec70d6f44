"""Owns the scheduler's machine and its thread. Rule: one thread at a time has the machine.

The thread sleeps until many events, or an event of another thread, are posted, or the machine's next deadline. The main
thread takes few events by itself; see `MessageBus`.
"""

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
    """Drives a scheduler machine; nothing else touches the machine while it runs.

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
        self._has_machine = threading.Lock()
        self._failed = 0  # The ticks in a row that raised.
        self._sleeps_until = -math.inf
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lattice-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        self._bus.step_by(self._step_here)

    def stop(self) -> None:
        """Let the thread finish its inbox and wait for it."""
        self._is_stopping.set()
        self._bus.close()
        self._thread.join()

    def _run(self) -> None:
        while self._failed <= len(PAUSES_S):
            try:
                if not self._failed:
                    self._sleep()
                with self._has_machine:
                    if not self._pass():
                        return
            except Exception:
                self._note_failure()
            if 0 < self._failed <= len(PAUSES_S):
                # Not on the inbox: each event would cause another try, and another line in the log.
                self._is_stopping.wait(PAUSES_S[self._failed - 1])
        log.critical("the scheduler has failed %d times in a row and gives up", self._failed)
        self._on_failure()

    def _sleep(self) -> None:
        with self._has_machine:
            deadline = self.machine.next_deadline()
            self._sleeps_until = math.inf if deadline is None else deadline
        self._bus.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _step_here(self) -> bool:
        """Take the posted events on the main thread; return False when the scheduler's thread has to."""
        if not self._has_machine.acquire(blocking=False):
            return False
        try:
            if self._failed or not self._pass():
                return False
            deadline = self.machine.next_deadline()
            return deadline is None or deadline >= self._sleeps_until
        except Exception:
            self._note_failure()
            return False
        finally:
            self._has_machine.release()

    def _pass(self) -> bool:
        """Take the posted events and tick; return False after the bus closed."""
        events = self._bus.take()
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
        self._failed = 0
        if self.on_pass is not None:
            self.on_pass(len(events), time.monotonic() - now)
        return True

    def _note_failure(self) -> None:
        self._failed += 1
        log.exception("the scheduler could not place queued tasks, %d times in a row", self._failed)
