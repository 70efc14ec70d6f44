"""The task of a gateway: serves the proxy on the loopback address, and keeps its routes and keys as the server says.

Gateways of other nodes are served at the address of the node, by certificates of the server's.

Rule: a key that the server has ended is refused from then on, and its open requests end.
"""

import asyncio
import logging
import os
import resource
import socket
from collections import OrderedDict
from ipaddress import ip_address
from typing import Any

from aiohttp import web

from lattice_worker import background, context, secrecy
from lattice_worker.gateway.identity import Identity, keep_alive
from lattice_worker.gateway.permits import Permits
from lattice_worker.gateway.proxy import Proxy
from lattice_worker.gateway.refusals import Refusal
from lattice_worker.gateway.relay import Relay
from lattice_worker.gateway.reports import Reports
from lattice_worker.gateway.routing import Routing

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_KEYS = 10_000  # That are remembered.
WAIT_S = 600.0
# How many keys are asked for at once: an attempt may have 1,000 questions without an answer, and one more ends it.
MAX_ASKED = 100
# Has the port for gateways of other nodes, if the worker was given one.
PORT_VARIABLE = "LATTICE_GATEWAY_PORT"


def serve() -> dict[str, Any]:
    """Run the gateway to its end; the server calls it by its name."""
    secrecy.keep_secrets()  # It has the keys of providers.
    # A request has two connections.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return asyncio.run(Gateway().run())


class Gateway:
    """The gateway of this node."""

    def __init__(self) -> None:
        self._routing = Routing()
        # By key, and then by the gateway that passes the key on; "" for a request of this node.
        self._services: OrderedDict[str, dict[str, str]] = OrderedDict()
        self._starts: dict[str, asyncio.Task[str]] = {}  # By service; what all requests to it wait for.
        self._asking = asyncio.Semaphore(MAX_ASKED)
        self._permits = Permits(context.ask_async)
        self._reports = Reports()
        self._identity = Identity()
        self._port = int(os.environ.get(PORT_VARIABLE, "0"))
        self._proxy = Proxy(self._routing, self._service_of, self._wait, self._permits, self._reports.note)
        self._relay = Relay(self._routing, self._service_of)

    async def run(self) -> dict[str, Any]:
        """Serve until the server does not know this gateway any more."""
        started = await context.ask_async("lattice/gateway.start", {"request": self._identity.request})
        self._identity.take(started["certificate"], started["authority"])
        self._proxy.to_gateways = self._identity.context(is_server=False)
        runners = [
            web.AppRunner(one.door.application(), access_log=None, handler_cancellation=True)
            for one in (self._proxy, self._relay)
        ]
        for runner in runners:
            await runner.setup()
        try:
            endpoint = await self._listen(runners[0], _listening(HOST, str(started["endpoint"])))
            peer = await self._listen_to_gateways(runners[1], str(started["host"]))
            await context.ask_async("lattice/gateway.ready", {"endpoint": endpoint, "peer": peer})
            try:
                async with asyncio.TaskGroup() as serving:
                    serving.create_task(self._permits.serve())
                    serving.create_task(self._follow())
                    if started.get("reports"):
                        serving.create_task(self._reports.run())
            except* context.QuestionError:
                pass  # The server does not know this gateway any more.
        finally:
            for runner in runners:
                await runner.cleanup()
        return {}

    async def _listen(self, runner: web.AppRunner, listener: socket.socket, **settings: Any) -> str:
        """Serve at a socket; return its address."""
        await web.SockSite(runner, listener, **settings).start()
        host, port = listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _listen_to_gateways(self, runner: web.AppRunner, host: str) -> str:
        """Serve gateways of other nodes at an address; return it, or nothing when that is not possible.

        A port that was set is open in firewalls, and another one would not be: it is not replaced by a free one.
        """
        try:
            address = ip_address(host)
            if address.is_unspecified:
                raise ValueError("the node has no address of its own")
            listener = _listening_at(str(address), self._port)
        except (OSError, ValueError) as error:
            where = f"{host} port {self._port}" if self._port else host
            log.warning("gateways of other nodes cannot reach this one: %s: %s", where, error)
            return ""
        keep_alive(listener)
        return await self._listen(runner, listener, ssl_context=self._identity.context(is_server=True))

    async def _follow(self) -> None:
        while True:
            self._take(await context.ask_async("lattice/gateway.routes"))

    def _take(self, news: dict[str, Any]) -> None:
        self._routing.update(news["services"])
        for key in news["revoked"]:
            self._services.pop(key, None)
            self._proxy.door.end_requests(key)
            self._relay.door.end_requests(key)

    async def _service_of(self, key: str, gateway: str = "") -> str | None:
        """Return the service that a key is for, which a gateway may pass on; None when it is not valid here."""
        if (known := self._services.get(key, {}).get(gateway)) is not None:
            return known
        async with self._asking:
            found = await context.ask_async("lattice/gateway.key", {"key": key, "gateway": gateway})
        service: str | None = found.get("service")
        if service is not None:
            self._services.setdefault(key, {})[gateway] = service
            if len(self._services) > MAX_KEYS:
                self._services.popitem(last=False)
        return service

    async def _wait(self, service: str) -> None:
        """Wait until a service has an instance that is ready. Raises Refusal."""
        start = self._starts.get(service)
        if start is None:
            start = self._starts[service] = background.share(self._start(service))
            start.add_done_callback(lambda _: self._starts.pop(service))
        try:
            async with asyncio.timeout(WAIT_S):
                # Other requests wait for it too.
                failure = await asyncio.shield(start)
        except TimeoutError:
            text = f"no instance was ready within {WAIT_S:g} s"
            raise Refusal(503, "model_not_ready", text, retry_after_s=10) from None
        if failure:
            raise Refusal(503, "model_failed", failure)

    async def _start(self, service: str) -> str:
        """Have a service start if it needs to; return nothing once an instance is ready, or why none can be."""
        while True:
            news = self._routing.news
            try:
                await context.ask_async("lattice/gateway.wait", {"name": service})
            except context.QuestionError as error:
                return str(error)
            route = self._routing.find(service)
            if route is not None and (route.targets or route.is_away):
                return ""
            # The routes that the answer speaks of are on their way.
            await news.wait()


def _listening(host: str, earlier: str) -> socket.socket:
    """Return a socket that listens where an earlier gateway did, or else at a free port. Raises OSError."""
    try:
        return _listening_at(host, int(earlier.rpartition(":")[2] or 0))
    except OSError:
        return _listening_at(host, 0)


def _listening_at(host: str, port: int) -> socket.socket:
    """Return a socket that listens at a port, or at a free one for 0. Raises OSError."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
