"""The HTTP server of a gateway: takes requests in the API of OpenAI, each with a key, until the key ends.

Rule: every refusal has the form of the API, and a request ends with its key.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from lattice_worker.gateway.engines import PATHS, session
from lattice_worker.gateway.refusals import ENDED_KEY, TOO_DEEP, TOO_LARGE, Refusal, key_of

BEGUN = web.RequestKey("begun", bool)  # Of a request whose answer has begun.
SERVICE = web.RequestKey("service", str)  # Of a request whose key is valid.
KEY = web.RequestKey("key", str)  # The key of such a request.
CALLER_GONE = 499  # The status of a request without an answer, because its caller left.


class Door:
    """Serves requests that `answer` answers.

    `service_of` returns the service of the key of a request. `note` is called at the end of each request with its
    service, or "", the status and the duration in seconds. A request has at most `max_bytes`. With `models` the models
    of a key are listed.
    """

    def __init__(
        self,
        service_of: Callable[[web.Request, str], Awaitable[str | None]],
        answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
        max_bytes: int,
        note: Callable[[str, int, float], object] = lambda service, status, seconds: None,
        models: Callable[[str], web.StreamResponse] | None = None,
    ) -> None:
        self._service_of = service_of
        self._answer = answer
        self._max_bytes = max_bytes
        self._note = note
        self._models = models
        self._open: dict[str, set[asyncio.Task[web.StreamResponse]]] = {}
        self.client: aiohttp.ClientSession

    def application(self) -> web.Application:
        """Return the application to serve."""
        made = web.Application(client_max_size=self._max_bytes)
        for path in PATHS:
            made.router.add_post(path, self._noted)
        if self._models is not None:
            made.router.add_get("/v1/models", self._list)
        made.cleanup_ctx.append(self._session)
        return made

    async def _session(self, _: web.Application) -> Any:
        async with session() as self.client:
            yield

    def end_requests(self, key: str) -> None:
        """End the open requests of a key."""
        for task in self._open.get(key, ()):
            task.cancel()

    async def _list(self, request: web.Request) -> web.StreamResponse:
        assert self._models is not None
        try:
            return self._models(await self._allowed(request))
        except Refusal as refusal:
            return refusal.response()

    async def _noted(self, request: web.Request) -> web.StreamResponse:
        started, status = time.monotonic(), CALLER_GONE
        try:
            response = await self._handle(request)
            status = response.status
            return response
        finally:
            self._note(request.get(SERVICE, ""), status, time.monotonic() - started)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            await self._allowed(request)
            return await self._until_key_ends(request)
        except Refusal as refusal:
            return refusal.response()
        except web.HTTPRequestEntityTooLarge:
            return Refusal(413, *TOO_LARGE).response()
        except RecursionError:
            return Refusal(400, *TOO_DEEP).response()

    async def _until_key_ends(self, request: web.Request) -> web.StreamResponse:
        task = asyncio.ensure_future(self._answer(request))
        opened = self._open.setdefault(request[KEY], set())
        opened.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            handler = asyncio.current_task()
            if handler is not None and handler.cancelling():
                raise  # A caller that is gone gets no answer.
            if BEGUN not in request:
                raise Refusal(401, *ENDED_KEY) from None
            cut(request)
            raise
        finally:
            opened.discard(task)
            if not opened:
                self._open.pop(request[KEY], None)

    async def _allowed(self, request: web.Request) -> str:
        """Return the service that the key of a request is for. Raises Refusal."""
        key = key_of(request)
        service = await self._service_of(request, key) if key else None
        if service is None:
            raise Refusal(401, *ENDED_KEY)
        request[KEY], request[SERVICE] = key, service
        return service


def cut(request: web.Request) -> None:
    """Break the connection of a request: its other end must not take a part of the answer for the whole."""
    if request.transport is not None:
        request.transport.abort()
