"""Owns the encoded events of runs that have several readers. Rule: an event is encoded once for all of them.

Serialized messages that are put together are the message of all their fields. So a response to `WatchRun` is made of
one serialized response for each event, and one with the other fields.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lattice.v1 import results_pb2

from lattice_server.core.messages import RunEvent
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.rpc.convert.events import fill_event

# The newest encoded events of a run are kept, up to these limits. Larger events are encoded for each reader.
KEPT_EVENTS = 512
KEPT_EVENT_BYTES = 16 * 1024


class EncodedEvents:
    """The encoded events of one run, and how many `readers` it has; lives on the main thread."""

    def __init__(self, entry: RunEntry) -> None:
        self.readers = 0
        self._tasks = entry.run.tasks
        self._kept: dict[int, tuple[RunEvent, bytes]] = {}

    def encode(self, event: RunEvent) -> bytes:
        """Return a serialized `WatchRunResponse` with this event only."""
        kept, data = self._kept.get(event.sequence, (None, b""))
        if kept is event:  # Its text may have been cut meanwhile.
            return data
        response = results_pb2.WatchRunResponse()
        fill_event(response.events.add(), self._tasks, event)
        data = response.SerializeToString()
        if self.readers > 1 and len(data) <= KEPT_EVENT_BYTES:
            self._kept[event.sequence] = event, data
            if len(self._kept) > KEPT_EVENTS:
                del self._kept[next(iter(self._kept))]
        return data


class ReadRuns:
    """The runs that are being read."""

    def __init__(self) -> None:
        self._runs: dict[int, EncodedEvents] = {}

    @contextmanager
    def reading(self, entry: RunEntry) -> Iterator[EncodedEvents]:
        """Count a reader of a run while the block runs; encoded events are kept until the last one leaves."""
        key = id(entry)  # The readers refer to the entry.
        found = self._runs.setdefault(key, EncodedEvents(entry))
        found.readers += 1
        try:
            yield found
        finally:
            found.readers -= 1
            if not found.readers:
                del self._runs[key]


def response(events: list[bytes], sequence: int, *, complete: bool = False) -> bytes:
    """Return a serialized `WatchRunResponse` with encoded events."""
    rest = results_pb2.WatchRunResponse(sequence=sequence, complete=complete)
    return b"".join([*events, rest.SerializeToString()])
