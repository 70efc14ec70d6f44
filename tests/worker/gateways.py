"""Gateways before engines, in one process, for the tests of a gateway's two listeners."""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from tests.ports import free_port

SERVICE = "tiny\ntenant"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}
WAIT_S = 30.0

Engine = Callable[[web.Request], Awaitable[web.StreamResponse]]


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def word(text: str, reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": reason}])


async def echo(request: web.Request) -> web.Response:
    return web.json_response({"body": await request.json(), "key": request.headers.get("authorization", "")})


async def busy(_: web.Request) -> web.Response:
    return web.json_response({"error": {"message": "busy"}}, status=503)


async def reset(request: web.Request) -> web.Response:
    """Break the connection before an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def breaking(request: web.Request) -> web.StreamResponse:
    """Break the connection after the first word of a stream."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(word("one"))
    await reset(request)
    return response


class Slow:
    """An engine that never answers."""

    def __init__(self) -> None:
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()
        return web.Response()


def closed_port() -> str:
    """Return an address at which nothing listens."""
    return f"127.0.0.1:{free_port()}"


async def until_waited_for(event: asyncio.Event) -> None:
    """Return when something waits for an event."""
    while not event._waiters:  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)


class Servers:
    """Servers on the loopback address; they end in the reverse order of their start."""

    def __init__(self) -> None:
        self._runners: list[web.AppRunner] = []

    async def serve(self, application: web.Application, context: ssl.SSLContext | None = None) -> str:
        """Serve an application; return its address."""
        runner = web.AppRunner(application, handler_cancellation=True)
        self._runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        host, port = runner.addresses[0][:2]
        return f"{host}:{port}"

    async def engine(self, handle: Engine) -> str:
        """Start an engine; return its address."""

        async def handled(request: web.Request) -> web.StreamResponse:
            return await handle(request)

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handled)
        return await self.serve(application)

    async def close(self) -> None:
        for runner in reversed(self._runners):
            await runner.cleanup()

    async def ask(self, name: str, value: object = None) -> None:
        """Take a question of a gateway about budgets."""
        raise AssertionError(f"no model here has a budget: {name}")


World = TypeVar("World", bound=Servers)


def run_in(world: Callable[[], World], run: Callable[[World, aiohttp.ClientSession], Awaitable[None]]) -> None:
    """Run a scenario of a task whose key is `key`, and end all servers after it."""

    async def whole() -> None:
        made = world()
        async with aiohttp.ClientSession(headers={"authorization": "Bearer key"}) as client:
            try:
                await asyncio.wait_for(run(made, client), WAIT_S)
            finally:
                await made.close()

    asyncio.run(whole())


async def check_broken_stream(client: aiohttp.ClientSession, url: str) -> None:
    """Ask for a stream of the engine `breaking`, and check that it ends with an error after its first word."""
    async with client.post(url, json=BODY | {"stream": True}) as answer:
        whole = (await answer.read()).split(b"\n\n")
    assert whole[0] + b"\n\n" == word("one")
    assert json.loads(whole[1][6:])["error"]["code"] == "replica_lost"
