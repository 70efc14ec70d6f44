"""The agent's connection to the process of its proxies, which it starts when an attempt first needs one.

Rule: an attempt whose proxy is gone is ended. Its accesses are known in full before its end is reported.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

from lattice_worker import background
from lattice_worker.sandbox.network import Endpoint
from lattice_worker.sandbox.policy import INTERPRETER_ENVIRONMENT

MODULE = "lattice_worker.egress.process"
REPLY_BYTES = 256 * 1024
CLOSE_S = 10.0
# Also the variables that configure the system's resolver of names.
ENVIRONMENT = INTERPRETER_ENVIRONMENT | {"PATH", "LANG", "RES_OPTIONS", "LOCALDOMAIN"}
Access = dict[str, Any]


class Connection:
    """The network of one attempt. `on_access` takes the first access of each server, `on_lost` says that it is gone."""

    def __init__(
        self,
        close: Callable[[], None],
        give_up: Callable[[], None],
        on_access: Callable[[Access], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._close, self._give_up = close, give_up
        self.on_access, self.on_lost = on_access, on_lost
        self.is_open = False  # Whether the process of the proxies knows it.
        self._is_closing = False
        self.closed: asyncio.Future[list[Access]] = asyncio.get_running_loop().create_future()

    async def close(self) -> list[Access]:
        """End the connections of the attempt; return the totals of its accesses."""
        if not self.closed.done() and not self._is_closing:
            self._is_closing = True
            self._close()
        try:
            async with asyncio.timeout(CLOSE_S):
                return await asyncio.shield(self.closed)
        except TimeoutError:
            self._give_up()
            return []


class Egress:
    """The proxies of an agent. `networks` are the inner networks that the operator allows, as a list in a text."""

    def __init__(self, networks: str = "") -> None:
        self._networks = networks
        self._numbers = count(1)
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._connections: dict[int, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def open(
        self,
        servers: Sequence[str],
        endpoints: Sequence[Endpoint],
        descriptors: Sequence[int],
        on_access: Callable[[Access], None],
        on_lost: Callable[[], None],
    ) -> Connection:
        """Have the connections of an attempt served. They wait until then. This closes the descriptors."""
        number = next(self._numbers)
        connection = Connection(partial(self._close, number), self._kill, on_access, on_lost)
        self._connections[number] = connection
        listeners = [[endpoint.host, endpoint.port if endpoint.host else 0] for endpoint in endpoints]
        request = {"open": number, "servers": list(servers), "listeners": listeners}
        task = background.start(self._open(number, request, descriptors), lambda _: self._lose_one(number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return connection

    async def _open(self, number: int, request: dict[str, Any], descriptors: Sequence[int]) -> None:
        try:
            async with self._starting:
                control = self._control or await self._start()
            if (connection := self._connections.get(number)) is not None:
                socket.send_fds(control, [json.dumps(request).encode()], descriptors)
                connection.is_open = True
        except OSError:
            self._lose_one(number)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: os.environ[name] for name in ENVIRONMENT & os.environ.keys()}
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), self._networks),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._read)
        return ours

    def close(self) -> None:
        """End the process, and with it all connections."""
        for task in self._tasks:
            task.cancel()
        self._lose()

    def _kill(self) -> None:
        """End a process that does not answer."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def wait_closed(self) -> None:
        """Wait for the end of the process. `close` comes first."""
        if self._process is not None:
            await self._process.wait()

    def _close(self, number: int) -> None:
        """Have the connections of an attempt ended. One that the process does not know yet has had none."""
        connection = self._connections.get(number)
        if connection is None:
            return
        try:
            if connection.is_open and self._control is not None:
                self._control.send(json.dumps({"close": number}).encode())
                return
        except OSError:
            pass
        del self._connections[number]
        connection.closed.set_result([])

    def _read(self) -> None:
        while self._control is not None:
            try:
                data = self._control.recv(REPLY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lose()
                return
            message = json.loads(data)
            if (number := message.get("closed")) is not None:
                if (connection := self._connections.pop(number, None)) and not connection.closed.done():
                    connection.closed.set_result(message["accesses"])
            elif connection := self._connections.get(message["first"]):
                connection.on_access(message["access"])

    def _lose(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        for number in list(self._connections):
            self._lose_one(number)

    def _lose_one(self, number: int) -> None:
        if (connection := self._connections.pop(number, None)) is not None:
            if not connection.closed.done():
                connection.closed.set_result([])
            connection.on_lost()
