"""A TCP proxy that breaks or silences connections on command, and gates that hold tasks until the test lets them go."""

import asyncio
import os
from pathlib import Path


class Proxy:
    """Carries bytes between its callers and `target`. Use it on one event loop."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._open: set[asyncio.StreamWriter] = set()
        self._mute: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._refused = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self.is_refusing = False
        self.refused = 0
        self.accepted = 0

    async def start(self) -> str:
        """Listen; return the address to dial."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Break everything and listen no more."""
        if self._server is not None:
            self._server.close()
        self.is_refusing = True
        self.cut()
        while self._pumps:
            await asyncio.wait(self._pumps)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._open:
            writer.transport.abort()

    def silence(self) -> None:
        """Let nothing through on the connections there are, and leave them open; new ones work."""
        self._mute |= self._open

    async def cut_and_refuse(self, dials: int) -> None:
        """Reset all connections and each new one; return when that many have been turned away."""
        self.is_refusing = True
        self.cut()
        goal = self.refused + dials
        async with self._refused:
            await self._refused.wait_for(lambda: self.refused >= goal)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_refusing:
            writer.transport.abort()
            async with self._refused:
                self.refused += 1
                self._refused.notify_all()
            return
        self.accepted += 1
        there, here = await asyncio.open_connection(self._host, self._port)
        self._open |= {writer, here}
        for source, sink in ((reader, here), (there, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                if sink not in self._mute:
                    sink.write(data)
                    await sink.drain()
        except ConnectionError:
            pass
        finally:
            self._open.discard(sink)
            self._mute.discard(sink)
            sink.transport.abort()


class Gate:
    """A place where a task waits: it reads one byte of the file at `path`, which `open` writes."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = str(folder / f"gate-{name}")
        os.mkfifo(self.path)
        # Open for both, so that neither side waits for the other to come.
        self._descriptor = os.open(self.path, os.O_RDWR)

    def open(self, times: int = 1) -> None:
        """Let that many tasks go."""
        os.write(self._descriptor, b"x" * times)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
