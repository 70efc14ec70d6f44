"""Owns the lines that the instances of one service wrote. Rule: the newest are kept, within bounds."""

from collections import deque
from collections.abc import Sequence

from lattice_server.core.frozen import frozen

MAX_LINES = 5000
MAX_BYTES = 4 * 1024 * 1024
MAX_LINE_BYTES = 16 * 1024
# The lines that are searched for the cause of a failure.
SEARCHED_LINES = 400


@frozen
class LogLine:
    """One line; `time_s` is seconds since the epoch."""

    number: int
    instance_id: str
    time_s: float
    text: str


class ServiceLog:
    """The numbered lines of a service; lives on the main thread."""

    def __init__(self, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES) -> None:
        self.last = 0
        self._lines: deque[LogLine] = deque()
        self._size_bytes = 0
        self._max_lines, self._max_bytes = max_lines, max_bytes

    def add(self, instance_id: str, texts: Sequence[str], time_s: float) -> None:
        """Add lines of an instance; one that is too long is cut."""
        for text in texts:
            self.last += 1
            cut = text.encode(errors="replace")[:MAX_LINE_BYTES].decode(errors="ignore")
            self._lines.append(LogLine(self.last, instance_id, time_s, cut))
            self._size_bytes += len(cut)
        while self._lines and (len(self._lines) > self._max_lines or self._size_bytes > self._max_bytes):
            self._size_bytes -= len(self._lines.popleft().text)

    def after(self, number: int, instance_id: str, limit_bytes: int) -> tuple[list[LogLine], int]:
        """Return the kept lines after a number, of one instance or of all, and the number to continue from."""
        found: list[LogLine] = []
        size, reached = 0, max(number, self.last if not self._lines else self._lines[0].number - 1)
        for line in self._lines:
            if line.number <= number:
                continue
            if not instance_id or line.instance_id == instance_id:
                size += len(line.text)
                if found and size > limit_bytes:
                    break
                found.append(line)
            reached = line.number
        return found, reached

    def tail(self, instance_id: str) -> list[str]:
        """Return the last lines of an instance."""
        found = [line.text for line in self._lines if line.instance_id == instance_id]
        return found[-SEARCHED_LINES:]
