"""Owns the two inboxes between the main thread and the scheduler's. Rule: posting never blocks; the bound is at
admission, not here."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from lattice_server.core.messages import SchedulerEffect, SchedulerEvent

MAX_WAIT_S = 3600.0  # The operating system refuses to wait for centuries.
# How many events, or effects, are delivered at once; other work may run before the rest.
MAX_EVENTS = 256


class MessageBus:
    """Carries events to the scheduler's thread and effects back to the main thread's event loop, both in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._to_scheduler: SimpleQueue[Sequence[SchedulerEvent] | None] = SimpleQueue()
        self._to_front: deque[SchedulerEffect] = deque()
        self._deliver: Callable[[list[SchedulerEffect]], None] = lambda effects: None
        self._is_waking = False

    def subscribe(self, deliver: Callable[[list[SchedulerEffect]], None]) -> None:
        """Have `deliver` called on the main thread with the queued effects."""
        self._deliver = deliver

    def post(self, events: Sequence[SchedulerEvent]) -> None:
        """Send events to the scheduler, from any thread."""
        if events:
            self._to_scheduler.put(events)

    def close(self) -> None:
        """End the scheduler's thread after the events that were posted before."""
        self._to_scheduler.put(None)

    def next_events(self, timeout_s: float | None) -> list[SchedulerEvent] | None:
        """Wait for events and return them; an empty list after `timeout_s` or an hour, None when closed."""
        try:
            first = self._to_scheduler.get(timeout=None if timeout_s is None else min(timeout_s, MAX_WAIT_S))
        except Empty:
            return []
        if first is None:
            return None
        events = list(first)
        while len(events) < MAX_EVENTS and not self._to_scheduler.empty():
            more = self._to_scheduler.get()
            if more is None:
                self._to_scheduler.put(None)
                break
            events.extend(more)
        return events

    def publish(self, effects: Sequence[SchedulerEffect]) -> None:
        """Send effects to the main thread, from the scheduler's. Several calls may share one wake-up."""
        if not effects:
            return
        self._to_front.extend(effects)
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._drain)

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
