"""Whether a streamed answer is complete. Rule: a stream that ends without a reason to finish is an error.

Clients take a connection that closes, and even `[DONE]`, for the end of a whole answer. Engines close connections, send
`[DONE]` after errors and finish with `abort` when they are stopped.
"""

import json
from collections.abc import Iterator
from typing import Any

from lattice_worker.gateway.usage import Usage

# Of the responses API; each ends a whole answer, or says itself that it failed.
RESPONSE_ENDS = frozenset({"response.completed", "response.failed", "response.incomplete", "error"})
ABORTED, DONE = "abort", b"[DONE]"
MAX_EVENT_BYTES = 16 * 1024 * 1024


class EventError(Exception):
    """An event is too large."""


class Watch:
    """Reads a stream of server-sent events as it passes; with `hides_usage` without events that only report usage."""

    def __init__(self, *, hides_usage: bool = False) -> None:
        self._rest = b""
        self._hides_usage = hides_usage
        self._begun: set[str] = set()  # Choices, by their index.
        self._finished: set[str] = set()
        self._has_ended = False
        self.usage = Usage()
        self.is_aborted = False

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole: every choice has a reason to finish, or the stream said that it is over."""
        return not self.is_aborted and (self._has_ended or (bool(self._finished) and self._begun <= self._finished))

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take bytes; yield the whole events among them. An event that says that the engine gave up is left out.

        Raises EventError.
        """
        # Joined first: a chunk may end within a line end.
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventError(f"an event has over {MAX_EVENT_BYTES} bytes")
        for event in events:
            is_shown = self._note(event)
            if self.is_aborted:
                return
            if is_shown:
                yield event + b"\n\n"

    def end(self) -> Iterator[bytes]:
        """Take the end of the stream; yield its last event if only the empty line after that is missing."""
        last = self._rest.strip().removeprefix(b"data:").strip()
        if last == DONE or (last and _loaded(last) is not None):
            yield from self.feed(b"\n\n")

    def _note(self, event: bytes) -> bool:
        """Take an event; return whether the caller gets it."""
        is_shown = True
        for line in event.split(b"\n"):
            if not line.startswith(b"data:"):
                continue
            if (found := _loaded(line[5:])) is not None:
                self._note_data(found)
                reports = self.usage.note(found)
                # The last event of the responses API reports the use too, and every caller needs it.
                is_shown = not (self._hides_usage and reports and found.get("choices") == [])
        return is_shown

    def _note_data(self, found: dict[str, Any]) -> None:
        if found.get("type") in RESPONSE_ENDS or found.get("error"):
            # An error that the engine reports is passed on, and needs no second one.
            self._has_ended = True
        choices = found.get("choices")
        self.usage.chunks += bool(choices) or str(found.get("type", "")).endswith(".delta")
        for choice in choices if isinstance(choices, list) else ():
            reason, index = _reason(choice), str(choice.get("index")) if isinstance(choice, dict) else ""
            self._begun.add(index)
            if reason == ABORTED:
                self.is_aborted = True
            elif reason:
                self._finished.add(index)


def _loaded(data: bytes) -> dict[str, Any] | None:
    """Return the object of an event; None for `[DONE]`, and for any other value."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_aborted(whole: bytes) -> bool:
    """Whether an answer that is no stream says that its engine gave up."""
    if ABORTED.encode() not in whole:
        return False
    found = _loaded(whole)
    choices = None if found is None else found.get("choices")
    return isinstance(choices, list) and any(_reason(choice) == ABORTED for choice in choices)


def _reason(choice: object) -> object:
    """Return the reason to finish of a choice; None for none."""
    return choice.get("finish_reason") if isinstance(choice, dict) else None


def error_event(message: str, code: str) -> bytes:
    """Return the event that tells a client that its answer is not complete."""
    return b"data: " + json.dumps(error_body(message, code)).encode() + b"\n\n"


def error_body(message: str, code: str, kind: str = "server_error") -> dict[str, Any]:
    """Return an error in the form of OpenAI's."""
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}
