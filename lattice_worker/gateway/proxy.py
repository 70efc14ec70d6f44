"""The HTTP server of a gateway: takes requests of tasks, and passes each to one instance of a model.

Rule: another instance is tried only while no byte of an answer has gone to the caller.
"""

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
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
from lattice_worker.gateway.permits import ImpossibleError, Permits
from lattice_worker.gateway.refusals import ENDED_KEY, MAX_REQUEST_BYTES, LimitedError, Refusal, key_of
from lattice_worker.gateway.routing import Routing, Target
from lattice_worker.gateway.sent import Sent
from lattice_worker.gateway.stream import EventError, Watch, error_event
from lattice_worker.gateway.usage import Estimates

log = logging.getLogger(__name__)

MAX_TRIES = 3
# How often a request is made that its provider refuses because of a limit.
MAX_LIMITED = 10
# Answers of an engine that does not serve now, which another instance may serve.
ELSEWHERE = frozenset({502, 503, 504})
BEGUN = web.RequestKey("begun", bool)  # Of a request whose answer has begun.
SERVICE = web.RequestKey("service", str)  # Of a request whose key is valid.
KEY = web.RequestKey("key", str)  # The key of such a request.
CALLER_GONE = 499  # The status of a request without an answer, because its caller left.


class Proxy:
    """Serves the API of OpenAI. `service_of` returns the service of a key, `wait` waits for an instance of one.

    `permits` has the requests wait for which a model has no budget now. Connections `to_gateways` of other nodes are
    made with these certificates; without them they fail.
    `note` is called at the end of each request with its service, or "", the status and the duration in seconds.
    """

    def __init__(
        self,
        routing: Routing,
        service_of: Callable[[str], Awaitable[str | None]],
        wait: Callable[[str], Awaitable[None]],
        permits: Permits,
        note: Callable[[str, int, float], object] = lambda service, status, seconds: None,
    ) -> None:
        self._routing = routing
        self._service_of = service_of
        self._wait = wait
        self._permits = permits
        self._estimates: dict[str, Estimates] = {}
        self._note = note
        self.to_gateways: ssl.SSLContext | None = None
        self._client: aiohttp.ClientSession
        self._open = OpenRequests()

    def application(self) -> web.Application:
        """Return the application to serve."""
        made = web.Application(client_max_size=MAX_REQUEST_BYTES)
        made.router.add_get("/v1/models", self._models)
        for path in PATHS:
            made.router.add_post(path, self._noted)
        made.cleanup_ctx.append(self._session)
        return made

    async def _session(self, _: web.Application) -> Any:
        async with session() as self._client:
            yield

    def end_requests(self, key: str) -> None:
        """End the open requests of a key."""
        self._open.end(key)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        try:
            service = await self._allowed(request)
        except Refusal as refusal:
            return refusal.response()
        model = {"id": _name(service), "object": "model", "created": 0, "owned_by": "lattice"}
        return web.json_response({"object": "list", "data": [model]})

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
            service = await self._allowed(request)
            task = asyncio.create_task(self._permitted(request, service))
            self._open.add(request[KEY], task)
            try:
                return await task
            except asyncio.CancelledError:
                handler = asyncio.current_task()
                if BEGUN in request or (handler is not None and handler.cancelling()):
                    raise  # An answer cannot be begun anew, and a caller that is gone gets none.
                raise Refusal(401, *ENDED_KEY) from None
        except Refusal as refusal:
            return refusal.response()

    async def _allowed(self, request: web.Request) -> str:
        """Return the service that the key of a request is for. Raises Refusal."""
        key = key_of(request)
        service = await self._service_of(key) if key else None
        if service is None:
            raise Refusal(401, *ENDED_KEY)
        request[KEY], request[SERVICE] = key, service
        return service

    async def _permitted(self, request: web.Request, service: str) -> web.StreamResponse:
        """Pass a request on when the budget of its model permits it; again if the provider refuses it all the same."""
        body = await self._body(request, service)
        if self._routing.choose(service) is None:
            # Its route may be on its way, and a permit is for a request that is made at once.
            await self._ready(service)
        route = self._routing.find(service)
        if route is None or not route.has_budget:
            return await self._pass(request, service, Sent(body))
        estimates = self._estimates.setdefault(service, Estimates())
        estimate = estimates.of(body, request.path, route.tokens)
        for number in range(1, MAX_LIMITED + 1):
            try:
                permit = await self._permits.acquire(service, estimate.tokens, is_again=number > 1)
            except ImpossibleError as error:
                raise Refusal(400, "budget_impossible", str(error)) from None
            note = partial(self._permits.note_answer, permit)
            sent = Sent(body, note, route.tokens is not None, is_last=number == MAX_LIMITED)
            try:
                return await self._pass(request, service, sent)
            except LimitedError:
                pass
            finally:
                if sent.limited is None:
                    estimates.learn(estimate, sent.usage)
                    self._permits.end(permit, sent.usage.tokens(estimate))
                else:
                    self._permits.refuse(permit, sent.limited.retry_after_s)
        raise AssertionError("the caller gets the last answer")

    async def _pass(self, request: web.Request, service: str, sent: Sent) -> web.StreamResponse:
        """Pass a request to an instance; to another one when the first does not answer."""
        tried: list[str] = []
        why = ""
        while len(tried) < MAX_TRIES:
            chosen = self._routing.choose(service, tried)
            if chosen is None:
                if tried:
                    break
                await self._ready(service)
                continue
            tried.append(chosen.instance_id)
            self._routing.begin(chosen.instance_id)
            try:
                return await self._try(request, service, sent, chosen)
            except _Elsewhere as elsewhere:
                why = str(elsewhere)
            finally:
                self._routing.end(chosen.instance_id)
        raise Refusal(503, "replica_lost", f"{len(tried)} instances of {_name(service)!r} did not answer: {why}")

    async def _body(self, request: web.Request, service: str) -> dict[str, Any]:
        try:
            body = json.loads(await request.read())
        except ValueError:
            raise Refusal(400, "invalid_json", "the body is not JSON") from None
        if not isinstance(body, dict):
            raise Refusal(400, "invalid_json", "the body is not an object")
        if body.get("model") != _name(service):
            text = f"this key is for the model {_name(service)!r}, not {body.get('model')!r}"
            raise Refusal(404, "model_not_found", text)
        return body

    async def _ready(self, service: str) -> None:
        """Wait until a service has an instance that is reached from here. Raises Refusal."""
        await self._wait(service)
        route = self._routing.find(service)
        if route is not None and route.is_away:
            text = f"the instances of {_name(service)!r} are on other nodes, whose gateways are not reached from here"
            raise Refusal(503, "replica_out_of_reach", text)

    async def _try(self, request: web.Request, service: str, sent: Sent, target: Target) -> web.StreamResponse:
        route, instance_id = self._routing.find(service), target.instance_id
        if route is None:
            raise Refusal(404, "model_not_found", f"there is no model {_name(service)!r} any more")
        body = sent.body_for(route, request.path)
        headers = passed(request.headers, route)
        secured: dict[str, Any] = {}
        if target.gateway:
            # The gateway there asks the server what the key is for, and has that of the engine.
            headers |= {"authorization": f"Bearer {request[KEY]}", INSTANCE_HEADER: instance_id}
            secured = {"ssl": self.to_gateways or True, "server_hostname": target.gateway}
        try:
            async with self._client.post(target.url(request.path_qs), json=body, headers=headers, **secured) as answer:
                if answer.ok:
                    sent.note_answer(answer.headers)
                # The task gets a provider's answer as it is, with the time after which it may retry.
                if answer.status in ELSEWHERE and not target.is_outside:
                    raise _Elsewhere(f"{instance_id} answered with {answer.status}")
                found = returned(answer.headers) | {INSTANCE_HEADER: instance_id}
                if answer.content_type == "text/event-stream":
                    return await self._stream(request, answer, found, instance_id, sent)
                whole = await answer.read()
                sent.note_whole(answer.status, answer.headers, whole)
        except REQUEST_ERRORS as error:
            raise _Elsewhere(f"{instance_id}: {type(error).__name__}: {error}") from error
        return web.Response(body=whole, status=answer.status, headers=found)

    async def _stream(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        headers: dict[str, str],
        instance_id: str,
        sent: Sent,
    ) -> web.StreamResponse:
        """Pass a stream on event by event. Before its first event nothing has gone to the caller."""
        watch, response, why = Watch(hides_usage=sent.hides_usage), None, ""
        sent.usage = watch.usage
        try:
            async for chunk in answer.content.iter_any():
                for event in watch.feed(chunk):
                    if response is None:
                        response = web.StreamResponse(status=answer.status, headers=headers)
                        response.headers["x-accel-buffering"] = "no"
                        request[BEGUN] = True
                        await response.prepare(request)
                    await response.write(event)
                if watch.is_aborted:
                    why = "the engine was stopped"
                    break
        except (aiohttp.ClientConnectionResetError, ConnectionResetError):
            # The caller is gone; the end of the connection to the engine ends its work.
            if response is not None:
                return response
            why = "the connection was reset"
        except (*REQUEST_ERRORS, EventError) as error:
            why = f"{type(error).__name__}: {error}"
        if response is None:
            raise _Elsewhere(f"{instance_id}: {why or 'its answer was empty'}")
        if why or not watch.is_complete:
            text = f"the answer of {instance_id} is not complete: {why or 'it ended without a reason to finish'}"
            await response.write(error_event(text, "replica_lost"))
        await response.write_eof()
        return response


class _Elsewhere(Exception):
    """An instance did not answer; another one may."""


def _name(service: str) -> str:
    """Return the name of a service within its tenant."""
    return service.partition("\n")[0]
