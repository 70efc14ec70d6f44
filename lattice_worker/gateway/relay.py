"""The door of a gateway for those of other nodes: takes their requests to instances on this node.

It passes bytes on as they are; whether an answer is complete, and whether another instance is tried, is decided by the
gateway of the node that the request comes from.
Rule: the server has to know both the key of the request and the other gateway, and have given the key to that node.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from lattice_worker.gateway.engines import (
    INSTANCE_HEADER,
    PATHS,
    REQUEST_ERRORS,
    OpenRequests,
    passed,
    returned,
    session,
)
from lattice_worker.gateway.identity import name_in
from lattice_worker.gateway.refusals import ENDED_KEY, MAX_REQUEST_BYTES, Refusal, key_of
from lattice_worker.gateway.routing import Route, Routing


class Relay:
    """Serves other gateways. `service_of` returns the service of a key that such a gateway passes on."""

    def __init__(self, routing: Routing, service_of: Callable[[str, str], Awaitable[str | None]]) -> None:
        self._routing = routing
        self._service_of = service_of
        self._open = OpenRequests()
        self._client: aiohttp.ClientSession

    def application(self) -> web.Application:
        """Return the application to serve."""
        # Its sender has read the body, and may have made it a little larger.
        made = web.Application(client_max_size=2 * MAX_REQUEST_BYTES)
        for path in PATHS:
            made.router.add_post(path, self._handle)
        made.cleanup_ctx.append(self._session)
        return made

    async def _session(self, _: web.Application) -> Any:
        async with session() as self._client:
            yield

    def end_requests(self, key: str) -> None:
        """End the open requests of a key."""
        self._open.end(key)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            key, gateway = key_of(request), name_in(request.get_extra_info("peercert"))
            service = await self._service_of(key, gateway) if key and gateway else None
            if service is None:
                raise Refusal(401, *ENDED_KEY)
            route = self._routing.find(service)
            endpoint = None if route is None else route.replicas.get(request.headers.get(INSTANCE_HEADER, ""))
            if route is None or endpoint is None or "://" in endpoint:
                raise Refusal(503, "replica_lost", "the instance is not ready on this node")
            task = asyncio.create_task(self._pass(request, route, endpoint))
            self._open.add(key, task)
            return await task
        except Refusal as refusal:
            return refusal.response()

    async def _pass(self, request: web.Request, route: Route, endpoint: str) -> web.StreamResponse:
        headers = passed(request.headers, route) | {"content-type": "application/json"}
        body, response = await request.read(), None
        try:
            url = f"http://{endpoint}{request.path_qs}"
            async with self._client.post(url, data=body, headers=headers) as answer:
                response = web.StreamResponse(status=answer.status, headers=returned(answer.headers))
                response.content_length = answer.content_length
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
        except REQUEST_ERRORS as error:
            if response is None or not response.prepared:
                text = f"the instance did not answer: {type(error).__name__}: {error}"
                raise Refusal(502, "replica_lost", text) from error
            _break(request)
            return response
        except asyncio.CancelledError:
            # The key has ended, or the other gateway is gone.
            _break(request)
            raise
        await response.write_eof()
        return response


def _break(request: web.Request) -> None:
    """Break the connection: its other end must not take what it has for a whole answer."""
    if request.transport is not None:
        request.transport.abort()
