"""Owns the two inboxes between the main thread and the scheduler. Rule: posting never blocks; the bound is at
admission, not here.

The scheduler's machine belongs to one thread at a time. Few events that the main thread posts are taken on that thread
too, later in its loop: to wake the other thread, and to be woken by it, costs more than the machine needs for them.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from lattice_server.core.messages import SchedulerEffect, SchedulerEvent

MAX_WAIT_S = 3600.0  # The operating system refuses to wait for centuries.
# How many events, or effects, are delivered at once; other work may run before the rest.
MAX_EVENTS = 256
# More events than these are left to the scheduler's thread: they would occupy the event loop for milliseconds.
MAX_EVENTS_HERE = 64


class MessageBus:
    """Carries events to the scheduler and effects back to the main thread's event loop, both in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._batches: deque[Sequence[SchedulerEvent] | Callable[[], object] | None] = deque()
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._is_woken = False
        self._step: Callable[[], bool] | None = None
        self._is_stepping = False
        self._to_front: deque[SchedulerEffect] = deque()
        self._deliver: Callable[[list[SchedulerEffect]], None] = lambda effects: None
        self._is_waking = False

    def subscribe(self, deliver: Callable[[list[SchedulerEffect]], None]) -> None:
        """Have `deliver` called on the main thread with the queued effects."""
        self._deliver = deliver

    def step_by(self, step: Callable[[], bool]) -> None:
        """Have `step` called on the main thread for few events. It returns False when the thread has to take them."""
        self._step = step

    def post(self, events: Sequence[SchedulerEvent]) -> None:
        """Send events to the scheduler, from any thread."""
        if not events:
            return
        self._batches.append(events)
        is_much = len(events) > MAX_EVENTS_HERE or len(self._batches) > MAX_EVENTS_HERE
        if is_much or self._step is None or threading.get_ident() != self._loop_thread:
            self.wake()
        elif not self._is_stepping:
            self._is_stepping = True
            self._loop.call_soon(self._step_here)

    def call_when_taken(self, then: Callable[[], object]) -> None:
        """Have `then` called on the main thread once the scheduler has taken all events that were posted before.

        Who posts very many events in parts waits for this before each part: events that others post meanwhile then wait
        behind one part only.
        """
        if self._batches:
            self._batches.append(then)
            self.wake()  # The scheduler's thread may have taken the others meanwhile.
        else:
            self._loop.call_soon(then)

    def close(self) -> None:
        """End the scheduler's thread after the events that were posted before."""
        self._batches.append(None)
        self.wake()

    def wake(self) -> None:
        """End the present or the next `wait`, from any thread."""
        # The waiter clears the flag before it looks at the inbox, so that events posted before are seen.
        if not self._is_woken:
            self._is_woken = True
            self._wakes.put(None)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until events are posted or the thread is woken, for `timeout_s` or an hour at most."""
        if self._batches:
            return
        try:
            self._wakes.get(timeout=None if timeout_s is None else min(timeout_s, MAX_WAIT_S))
        except Empty:
            return
        self._is_woken = False

    def take(self) -> list[SchedulerEvent] | None:
        """Return the posted events; None when closed. Only who has the scheduler's machine may call this."""
        events: list[SchedulerEvent] = []
        while self._batches and len(events) < MAX_EVENTS:
            batch = self._batches[0]
            if batch is None:
                return events or None
            self._batches.popleft()
            if callable(batch):
                self._loop.call_soon_threadsafe(batch)
            else:
                events.extend(batch)
        return events

    def publish(self, effects: Sequence[SchedulerEffect]) -> None:
        """Send effects to the main thread. Several calls may share one wake-up."""
        if not effects:
            return
        self._to_front.extend(effects)
        if threading.get_ident() != self._loop_thread and not self._is_waking:
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._drain)

    def _step_here(self) -> None:
        self._is_stepping = False
        assert self._step is not None, "it was there when the call was scheduled"
        if not self._step() or self._batches:
            self.wake()
        self._drain()

    def _drain(self) -> None:
        # Cleared first: an effect added after the copy finds the flag down and wakes the loop again.
        self._is_waking = False
        effects: list[SchedulerEffect] = []
        while self._to_front and len(effects) < MAX_EVENTS:
            effects.append(self._to_front.popleft())
        if self._to_front and not self._is_waking:
            self._is_waking = True
            self._loop.call_soon(self._drain)
        if effects:
            self._deliver(effects)
