"""Takes requests of tasks, and passes each to one instance of a model.

Rule: another instance is tried only while no byte of an answer has gone to the caller.
"""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
from aiohttp import web

from lattice_worker.gateway.door import BEGUN, KEY, SERVICE, Door
from lattice_worker.gateway.engines import (
    INSTANCE_HEADER,
    NOT_SENT,
    REQUEST_ERRORS,
    UNSENT_STATUS,
    AnswerTooLargeError,
    events_of,
    passed,
    returned,
    whole_of,
)
from lattice_worker.gateway.permits import ImpossibleError, Permits
from lattice_worker.gateway.refusals import MAX_REQUEST_BYTES, LimitedError, Refusal
from lattice_worker.gateway.routing import Routing, Target
from lattice_worker.gateway.sent import Sent
from lattice_worker.gateway.stream import EventError, Watch, error_event, is_aborted
from lattice_worker.gateway.tries import ElsewhereError, Tries
from lattice_worker.gateway.usage import Estimates

# How often a request is made that its provider refuses because of a limit.
MAX_LIMITED = 10
# How long the server may take to learn of the loss of an instance that a request met.
LOST_S = 10.0
# Answers of an engine that does not serve now, which another instance may serve.
ELSEWHERE = frozenset({502, 503, 504})
STOPPED = "the engine was stopped"


class Proxy:
    """Answers requests of tasks. `service_of` returns the service of a key, `wait` waits for an instance of one.

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
        lost_s: float = LOST_S,
    ) -> None:
        self._routing = routing
        self._wait = wait
        self._permits = permits
        self._lost_s = lost_s
        self._estimates: dict[str, Estimates] = {}
        self.to_gateways: ssl.SSLContext | None = None
        self.door = Door(lambda _, key: service_of(key), self._permitted, MAX_REQUEST_BYTES, note, _models)

    async def _permitted(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on when the budget of its model permits it; again if the provider refuses it all the same."""
        service = request[SERVICE]
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
                    self._permits.end(permit, sent.usage.tokens(estimate))
                    estimates.learn(estimate, sent.usage)
                else:
                    self._permits.refuse(permit, sent.limited.retry_after_s)
        raise AssertionError("the caller gets the last answer")

    async def _pass(self, request: web.Request, service: str, sent: Sent) -> web.StreamResponse:
        """Pass a request to an instance; to another one when the first does not answer."""
        tries, clock = Tries(self._lost_s), asyncio.get_running_loop().time
        while (chosen := await self._choose(service, tries)) is not None:
            self._routing.begin(chosen.instance_id)
            try:
                return await self._try(request, service, sent, chosen)
            except ElsewhereError as error:
                tries.note(chosen, error, clock())
            finally:
                self._routing.end(chosen.instance_id)
        raise Refusal(503, "replica_lost", f"no instance of {_name(service)!r} answered; the last one: {tries.why}")

    async def _choose(self, service: str, tries: Tries) -> Target | None:
        """Return the next instance for a request, which may have to be waited for; None when no other is tried."""
        while not tries.are_over:
            news = self._routing.news
            tries.keep(self._routing.targets(service))
            if (chosen := self._routing.choose(service, tries.failed)) is not None:
                return chosen
            if (until := tries.lost_until) is not None:
                try:
                    async with asyncio.timeout_at(until):
                        await news.wait()
                except TimeoutError:
                    return None
            elif tries.failed:
                return None
            else:
                await self._ready(service)
        return None

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
            # The gateway there asks the server for the model of the key, and has the key of the engine.
            headers |= {"authorization": f"Bearer {request[KEY]}", INSTANCE_HEADER: instance_id}
            secured = {"ssl": self.to_gateways or True, "server_hostname": target.gateway}
        url = target.url(request.path_qs)
        try:
            async with self.door.client.post(url, json=body, headers=headers, **secured) as answer:
                if answer.ok:
                    sent.note_answer(answer.headers)
                # The task gets a provider's answer as it is, with the time after which it may retry.
                if answer.status in ELSEWHERE and not target.is_outside:
                    # The gateway there names the instance in an answer that is the instance's.
                    is_lost = bool(target.gateway) and INSTANCE_HEADER not in answer.headers
                    was_sent = not is_lost or answer.status != UNSENT_STATUS
                    raise ElsewhereError(
                        f"{instance_id} answered with {answer.status}", is_lost=is_lost, was_sent=was_sent
                    )
                found = returned(answer.headers) | {INSTANCE_HEADER: instance_id}
                if answer.content_type == "text/event-stream":
                    return await self._stream(request, answer, found, target, sent)
                whole = await whole_of(answer)
                if is_aborted(whole):
                    raise ElsewhereError(f"{instance_id}: {STOPPED}", is_lost=not target.is_outside)
                sent.note_whole(answer.status, answer.headers, whole)
        except AnswerTooLargeError as error:
            raise Refusal(502, "answer_too_large", f"the answer of {instance_id} has {error}") from error
        except REQUEST_ERRORS as error:
            why, was_sent = f"{instance_id}: {type(error).__name__}: {error}", not isinstance(error, NOT_SENT)
            raise ElsewhereError(why, is_lost=not target.is_outside, was_sent=was_sent) from error
        return web.Response(body=whole, status=answer.status, headers=found)

    async def _stream(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        headers: dict[str, str],
        target: Target,
        sent: Sent,
    ) -> web.StreamResponse:
        """Pass a stream on event by event. Before its first event nothing has gone to the caller."""
        watch, response, why, is_lost = Watch(hides_usage=sent.hides_usage), None, "", False
        sent.usage = watch.usage
        try:
            async for events in events_of(answer, watch):
                for event in events:
                    if response is None:
                        response = web.StreamResponse(status=answer.status, headers=headers)
                        response.headers["x-accel-buffering"] = "no"
                        request[BEGUN] = True
                        await response.prepare(request)
                    await response.write(event)
                if watch.is_aborted:
                    why, is_lost = STOPPED, True
                    break
        except (aiohttp.ClientConnectionResetError, ConnectionResetError):
            # The caller is gone; the end of the connection to the engine ends its work.
            if response is not None:
                return response
            why, is_lost = "the connection was reset", True
        except (*REQUEST_ERRORS, EventError) as error:
            why, is_lost = f"{type(error).__name__}: {error}", not isinstance(error, EventError)
        if response is None:
            why = f"{target.instance_id}: {why or 'its answer was empty'}"
            raise ElsewhereError(why, is_lost=is_lost and not target.is_outside)
        if why or not watch.is_complete:
            text = f"the answer of {target.instance_id} is not complete: {why or 'it ended without a reason to finish'}"
            await response.write(error_event(text, "replica_lost"))
        await response.write_eof()
        return response


def _name(service: str) -> str:
    """Return the name of a service within its tenant."""
    return service.partition("\n")[0]


def _models(service: str) -> web.StreamResponse:
    """Return the list of the models of a key."""
    model = {"id": _name(service), "object": "model", "created": 0, "owned_by": "lattice"}
    return web.json_response({"object": "list", "data": [model]})
