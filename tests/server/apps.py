"""Whole servers inside a test: on the test's own event loop, or on a thread for tests that call synchronously."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest import mock

from lattice_server.app import App
from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent
from lattice_server.engine.ports import Contact, Executor, Machine, Membership

START_S = 60.0
# A busy machine may stop a worker for longer than by default it may be silent; its attempts would then run again.
SESSION_TTL_S = 12.0


class NoWorkers:
    """An executor that starts no worker: tasks stay queued."""

    name = "none"
    given_up: frozenset[str] = frozenset()

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start nothing."""

    async def stop(self) -> None:
        """End nothing."""

    def ray_address(self) -> str:
        """Return nothing."""
        return ""

    async def join(self, machine: Machine) -> Membership:
        """Let the machine serve its node itself."""
        return Membership(None, asyncio.get_running_loop().create_future())

    def leave(self, node_id: str, membership: Membership) -> None:
        """Do nothing."""

    def has_given_up(self, worker_id: str) -> bool:
        """Return True for the workers that a test gave up."""
        return worker_id in self.given_up


def build(executor: Executor | None = None, **settings: Any) -> App:
    """Return an unstarted server on a port of its own; with its own kind of workers when `executor` is given."""
    known = {"port": 0, "executor": "local", "num_cpus": 2, "session_ttl_s": SESSION_TTL_S}
    config = ServerConfig(**known | settings)
    if executor is None:
        app = App(config)
    else:
        with mock.patch("lattice_server.app.executor_of", return_value=executor):
            app = App(config)
    # The memory of a server's process is not its own here: looking through that of all tests takes most of a start.
    app._garbage.start = lambda: None  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def serving(executor: Executor | None = None, **settings: Any) -> AsyncIterator[App]:
    """Serve while the block runs."""
    app = build(executor, **settings)
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


@contextmanager
def serving_aside(executor: Executor | None = None, **settings: Any) -> Iterator[str]:
    """Serve on a thread while the block runs; yield the address."""
    addresses: list[str] = []
    is_ready = threading.Event()
    stops: list[Callable[[], None]] = []

    async def serve() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stopping.set))
        async with serving(executor, **settings) as app:
            addresses.append(app.address)
            is_ready.set()
            await stopping.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            is_ready.set()

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    try:
        assert is_ready.wait(START_S)
        yield addresses[0]
    finally:
        stops[0]()
        thread.join(START_S)
        assert not thread.is_alive()
