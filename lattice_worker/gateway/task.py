"""The task of a gateway: serves the proxy on the loopback address, and keeps its routes and keys as the server says.

Rule: a key that the server has ended is refused from then on, and its open requests end.
"""

import asyncio
import socket
from contextlib import suppress
from typing import Any

from aiohttp import web

from lattice_worker import context
from lattice_worker.gateway.proxy import Proxy, Refusal
from lattice_worker.gateway.reports import Reports
from lattice_worker.gateway.routing import Routing

HOST = "127.0.0.1"
# Keys that no request of this node could ever have are remembered too, within bounds.
MAX_KEYS = 10_000
WAIT_S = 600.0


def serve() -> dict[str, Any]:
    """Run the gateway to its end; the server calls it by its name."""
    return asyncio.run(Gateway().run())


class Gateway:
    """The gateway of this node."""

    def __init__(self) -> None:
        self._routing = Routing()
        self._services: dict[str, str] = {}
        self._news = asyncio.Event()  # Set, and replaced, when routes arrive.
        self._reports = Reports()
        self._proxy = Proxy(self._routing, self._service_of, self._wait, self._reports.note)

    async def run(self) -> dict[str, Any]:
        """Serve until the server does not know this gateway any more."""
        started = await context.ask_async("lattice/gateway.start")
        reporting = asyncio.create_task(self._reports.run()) if started.get("reports") else None
        runner = web.AppRunner(self._proxy.application(), access_log=None, handler_cancellation=True)
        await runner.setup()
        with _listening(str(started["endpoint"])) as listener:
            await web.SockSite(runner, listener).start()
            host, port = listener.getsockname()
            await context.ask_async("lattice/gateway.ready", {"endpoint": f"{host}:{port}"})
            with suppress(context.QuestionError):
                while True:
                    self._take(await context.ask_async("lattice/gateway.routes"))
        if reporting is not None:
            reporting.cancel()
        await runner.cleanup()
        return {}

    def _take(self, news: dict[str, Any]) -> None:
        self._routing.update(news["services"])
        self._news.set()
        self._news = asyncio.Event()
        for key in news["revoked"]:
            self._services.pop(key, None)
            self._proxy.end_requests(key)

    async def _service_of(self, key: str) -> str | None:
        """Return the service that a key is for; None when it is not valid here."""
        if key not in self._services:
            found = await context.ask_async("lattice/gateway.key", {"key": key})
            if "service" not in found:
                return None
            if len(self._services) >= MAX_KEYS:
                self._services.pop(next(iter(self._services)))
            self._services[key] = found["service"]
        return self._services[key]

    async def _wait(self, service: str) -> None:
        """Wait until a service has an instance that is ready. Raises Refusal."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    news = self._news
                    await context.ask_async("lattice/gateway.wait", {"name": service})
                    route = self._routing.find(service)
                    if route is not None and (route.replicas or route.is_away):
                        return
                    # The routes that the answer speaks of are on their way.
                    await news.wait()
        except context.QuestionError as error:
            raise Refusal(503, "model_failed", str(error)) from error
        except TimeoutError:
            text = f"no instance was ready within {WAIT_S:g} s"
            raise Refusal(503, "model_not_ready", text, retry_after_s=10) from None


def _listening(endpoint: str) -> socket.socket:
    """Return a socket that listens where an earlier gateway of this node did, or else at a free port."""
    port = int(endpoint.rpartition(":")[2] or 0)
    try:
        return socket.create_server((HOST, port))
    except OSError:
        return socket.create_server((HOST, 0))
