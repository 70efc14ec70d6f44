"""Takes requests of the gateways of other nodes to instances on this node.

It passes bytes on as they are; whether an answer is complete, and whether another instance is tried, is decided by the
gateway of the node that the request comes from.
Rule: the server has to know both the key of the request and the other gateway, and have given the key to that node.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from lattice_worker.gateway.door import BEGUN, SERVICE, Door, cut
from lattice_worker.gateway.engines import INSTANCE_HEADER, NOT_SENT, REQUEST_ERRORS, UNSENT_STATUS, passed, returned
from lattice_worker.gateway.identity import name_in
from lattice_worker.gateway.refusals import MAX_REQUEST_BYTES, Refusal
from lattice_worker.gateway.routing import Routing


class Relay:
    """Answers other gateways. `service_of` returns the service of a key that such a gateway passes on."""

    def __init__(self, routing: Routing, service_of: Callable[[str, str], Awaitable[str | None]]) -> None:
        self._routing = routing
        self._service_of = service_of
        # Its sender has read the body, and may have made it a little larger.
        self.door = Door(self._passed_on, self._pass, 2 * MAX_REQUEST_BYTES)

    async def _passed_on(self, request: web.Request, key: str) -> str | None:
        gateway = name_in(request.get_extra_info("peercert"))
        return await self._service_of(key, gateway) if gateway else None

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        route, name = self._routing.find(request[SERVICE]), request.headers.get(INSTANCE_HEADER, "")
        endpoint = None if route is None else route.replicas.get(name)
        if route is None or endpoint is None or "://" in endpoint:
            raise Refusal(UNSENT_STATUS, "replica_lost", "the instance is not ready on this node")
        headers = passed(request.headers, route) | {"content-type": "application/json"}
        url, body = f"http://{endpoint}{request.path_qs}", await request.read()
        try:
            async with self.door.client.post(url, data=body, headers=headers) as answer:
                named = returned(answer.headers) | {INSTANCE_HEADER: name}
                response = web.StreamResponse(status=answer.status, headers=named)
                response.content_length = answer.content_length
                request[BEGUN] = True
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
        except REQUEST_ERRORS as error:
            if BEGUN not in request:
                text = f"the instance did not answer: {type(error).__name__}: {error}"
                raise Refusal(UNSENT_STATUS if isinstance(error, NOT_SENT) else 502, "replica_lost", text) from error
            cut(request)
            return response
        await response.write_eof()
        return response
