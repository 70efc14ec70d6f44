"""Output past `sys.stdout` and `sys.stderr`: of C libraries, child processes and bare descriptors."""

import asyncio
import codecs
import contextlib
import os
from collections.abc import Callable

READ_BYTES = 1 << 16


class RawOutput:
    """The read ends of a process's own standard streams. `before_read` is called before data is given to `take`, which
    gets a stream's name, text, the number of bytes it was, and the number of the invocation that `writer` named."""

    def __init__(
        self,
        descriptors: dict[str, int],
        before_read: Callable[[], None],
        writer: Callable[[], int],
        take: Callable[[str, str, int, int], None],
    ) -> None:
        self._before_read, self._writer, self._take = before_read, writer, take
        decoder = codecs.getincrementaldecoder("utf-8")
        self._streams = {descriptor: (name, decoder("replace")) for name, descriptor in descriptors.items()}
        for descriptor in self._streams:
            os.set_blocking(descriptor, False)
            asyncio.get_running_loop().add_reader(descriptor, self._on_readable, descriptor)

    def _on_readable(self, descriptor: int) -> None:
        self._before_read()
        if descriptor in self._streams:
            self._read(descriptor)

    def read(self) -> None:
        """Read output that is there, up to a bound."""
        for descriptor in list(self._streams):
            self._read(descriptor)

    def _read(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            name, decoder = self._streams[descriptor]
            # Before the data: an invocation that finds its pipe empty ends, and is not named any more.
            number = self._writer()
            data = os.read(descriptor, READ_BYTES)
            if data:
                self._take(name, decoder.decode(data), len(data), number)
            else:
                self._close(descriptor)

    def close(self) -> None:
        """Close the streams."""
        for descriptor in list(self._streams):
            self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        del self._streams[descriptor]
        os.close(descriptor)
