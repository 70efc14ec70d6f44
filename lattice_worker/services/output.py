"""The lines that a program writes, until they are reported. Rule: a slow reader never blocks the program.

The newest lines are kept; a note takes the place of dropped lines. Secrets are masked before a line is kept.
"""

import asyncio
from collections import deque
from collections.abc import Iterable

from lattice_worker.masking import MASK, masked_forms

MAX_LINES = 2000
MAX_LINE_BYTES = 16 * 1024
# The size of one report; a question may have 1 MiB.
REPORT_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024


class Output:
    """The lines of one program; `news` is set when there is one to report."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self.news = asyncio.Event()
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._masked = [form.encode(errors="replace") for form in masked_forms(secrets)]
        # A piece of a line is cut where no secret can lie on both sides.
        self._held_bytes = max((len(form) - 1 for form in self._masked), default=0)

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Take all that is written to a stream, to its end."""
        rest = b""
        while chunk := await stream.read(CHUNK_BYTES):
            *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n")
            for line in whole:
                self._add(line)
            # A line without an end, such as a progress bar, is cut in pieces.
            while len(rest) > MAX_LINE_BYTES + self._held_bytes:
                if (masked := self._mask(rest)) != rest:
                    rest = masked
                    continue
                self._add(rest[:MAX_LINE_BYTES])
                rest = rest[MAX_LINE_BYTES:]
        if rest:
            self._add(rest)

    def add(self, text: str) -> None:
        """Add a line of the worker's own."""
        self._add(text.encode(errors="replace"))

    def _add(self, line: bytes) -> None:
        shown = self._mask(line.rpartition(b"\r")[2])[:MAX_LINE_BYTES]
        self._lines.append(shown.decode(errors="replace"))
        if len(self._lines) > MAX_LINES:
            self._lines.popleft()
            self._dropped += 1
        self.news.set()

    def _mask(self, line: bytes) -> bytes:
        for form in self._masked:
            line = line.replace(form, MASK.encode())
        return line

    def take(self) -> list[str]:
        """Return the lines of the next report."""
        found: list[str] = []
        if self._dropped:
            found.append(f"[{self._dropped} lines were dropped: they came faster than they could be reported]")
            self._dropped = 0
        size = 0
        while self._lines and size < REPORT_BYTES:
            found.append(self._lines.popleft())
            size += len(found[-1])
        if not self._lines:
            self.news.clear()
        return found
